"""Tensor parallelism: which part of a model each rank holds, and what ranks must be able to do together.

    attention     Q heads in `size` equal runs; each rank holds the K heads, and separately the V heads, that its own Q
                  heads read. So heads are split where `size` divides their number, and repeated where it does not
    o, down       the columns that meet the rank's heads or inner units; the ranks' results are summed (all_reduce)
    gate, up      rows, in runs as equal as can be
    AugQ          every unit of this MLP reads the whole q0, so q_proj is repeated (4 of 68 million weights in a block
                  of Sigma 1.5B) and the MLP (19 million) is split as the feed-forward is: one more sum, of [T, Hq Dk].
                  Splitting q_proj as well would need q0 gathered first, an exchange that lasts longer than reading
                  its other half; repeating the MLP would need no exchange, but no rank would read less of it
    embedding     repeated: a step reads one row per token
    output head   rows, as a step reads all of them; scores are gathered on rank 0, which samples
    norms         repeated; they act on whole hidden states or on single heads

Sums in another order are the only difference to one process. A result of `n` products then moves by at most
2 (n - 1) u sum|a b|, u = 2**-24 in float32, and by about sqrt(n) u in practice. In bfloat16 each rank's part is rounded
before the sum, once more than in one process.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from anabranch.models.config import ModelConfig


class Group(Protocol):
    """The ranks that hold one model together. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on every rank; x is overwritten."""
        ...

    def gather(self, x: Tensor, total: int) -> Tensor:
        """On rank 0 the columns of all ranks, [n, total] from [n, len(split(total, rank, size))]; elsewhere x."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds, as ranges of the whole model.

    config   the part as a model of its own: its head counts and inner widths, everything else the whole model's
    """

    whole: ModelConfig
    config: ModelConfig
    q_heads: range
    k_heads: range
    v_heads: range
    ffn: range
    augq: range  # empty without AugQ
    vocab: range  # rows of the output head

    @property
    def q_columns(self) -> range:
        """The rank's part of the columns of q."""
        return rows_of(self.q_heads, self.whole.k_dim)

    @property
    def q_proj(self) -> range:
        """Rows of q_proj: the rank's heads, or all of them to feed AugQ."""
        return self.q_columns if self.whole.q_intermediate_size is None else range(self.whole.q_width)


def cut(config: ModelConfig, rank: int, size: int) -> Shard:
    """The part of rank `rank` of `size`. ValueError if the model cannot be cut so; it names what stands in the way."""
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in [0, size), got rank={rank}, size={size}")
    if config.q_heads % size:
        raise ValueError(f"tensor_parallel_size must divide the {config.q_heads} query heads, got {size}")
    for name in ("ffn_size", "vocab_size", "q_intermediate_size"):
        count = getattr(config, name)
        if count is not None and count < size:
            raise ValueError(f"{size} ranks cannot share {name}={count}: each needs one at least")
    q_heads = split(config.q_heads, rank, size)
    k_heads, v_heads = (_read_by(q_heads, config.q_heads, heads) for heads in (config.k_heads, config.v_heads))
    ffn, vocab = split(config.ffn_size, rank, size), split(config.vocab_size, rank, size)
    inner = config.q_intermediate_size
    augq = range(0) if inner is None else split(inner, rank, size)
    part = replace(
        config, q_heads=len(q_heads), k_heads=len(k_heads), v_heads=len(v_heads), ffn_size=len(ffn),
        q_intermediate_size=None if inner is None else len(augq),
    )  # fmt: skip
    return Shard(
        whole=config, config=part, q_heads=q_heads, k_heads=k_heads, v_heads=v_heads, ffn=ffn, augq=augq, vocab=vocab
    )


def split(count: int, rank: int, size: int) -> range:
    """A rank's run of `count` things; the longest is one longer than the shortest at most."""
    return range(count * rank // size, count * (rank + 1) // size)


def rows_of(heads: range, width: int) -> range:
    """Rows of a projection that make these heads."""
    return range(heads.start * width, heads.stop * width)


def _read_by(q_heads: range, Hq: int, H: int) -> range:
    """Of H heads those that a run of query heads reads, if the run reads all of them equally often.

    An op is given head counts alone: it has local query head i read local head i * H // Hq. That is true of a run
    within one group, of whole groups, and of two half groups; a run such as (last of one group, two of the next) would
    need the groups' sizes as well.
    """
    group = Hq // H
    heads = range(q_heads.start // group, (q_heads.stop - 1) // group + 1)
    each, rest = divmod(len(q_heads), len(heads))
    if rest or any(head // group != heads[index // each] for index, head in enumerate(q_heads)):
        raise ValueError(
            f"the query heads {q_heads.start} to {q_heads.stop - 1} of one rank would read {len(heads)} of {H} K or V "
            f"heads, which serve {group} each, unequally often; choose another tensor_parallel_size"
        )
    return heads
