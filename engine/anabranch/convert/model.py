"""A model with fewer K heads than the one it is made from.

Only the rows of q and k and their biases change; V, the output matrix and all else stay as they are. With as many K
heads as before no weight is touched at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.convert.merge import (
    Merge,
    Statistics,
    key_energy,
    merge_by_mean,
    merge_by_svd,
    merge_error,
    to_complex,
    to_rows,
)
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Block, DenseAttend, Transformer

METHODS = {"svd": merge_by_svd, "mean": merge_by_mean}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """errors: per layer the share of the keys' energy that is lost, each weighed by how loudly it is read."""

    model: Transformer
    errors: tuple[float, ...]


def merged_config(config: ModelConfig, key_heads: int) -> ModelConfig:
    """The configuration with that many K heads; ValueError for models and counts that cannot be merged."""
    if config.qk_norm:
        raise ValueError(
            f"a {config.family} model norms every key after its projection: that undoes a factor folded into the "
            "weights before it, and its learned scale differs within a rotary pair, so heads cannot be merged exactly"
        )
    if config.q_intermediate_size is not None:
        raise ValueError("a model with an augmented query (q_intermediate_size) is not linear in W_Q: not implemented")
    if key_heads < 1 or config.k_heads % key_heads:
        divisors = [n for n in range(1, config.k_heads + 1) if config.k_heads % n == 0]
        raise ValueError(f"key heads must divide the model's {config.k_heads}: one of {divisors}, got {key_heads}")
    return replace(config, family="sigma", k_heads=key_heads)


def convert_model(
    model: Transformer, key_heads: int, *, method: str = "svd", statistics: Sequence[Statistics] | None = None
) -> Converted:
    """Merge the K heads of every layer; the model given is left alone.

    method      "svd" or "mean"; see merge.py
    statistics  of each layer, from `measure`; None takes what the first norm of a layer returns, before its learned
                scale, for uncorrelated and of equal size
    returns     a model of family sigma, on the device and in the dtype of the first
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {sorted(METHODS)}")
    config = merged_config(model.config, key_heads)
    if statistics is None:
        statistics = [weight_statistics(block) for block in _blocks(model)]
    merged = Transformer(config, dtype=model.embed.dtype, device=model.embed.device).eval()
    errors = []
    with torch.no_grad():
        source = model.state_dict()
        for name, tensor in merged.state_dict().items():
            if tensor.shape == source[name].shape:
                tensor.copy_(source[name])
        for old, new, known in zip(_blocks(model), _blocks(merged), statistics, strict=True):
            if key_heads == model.config.k_heads:
                errors.append(0.0)
                continue
            merge = METHODS[method](known, key_heads)
            _write(old, new, merge)
            errors.append(float(merge_error(known, merge).sum() / key_energy(known).sum()))
    return Converted(model=merged, errors=tuple(errors))


def weight_statistics(block: Block) -> Statistics:
    """Statistics from the weights alone: the normed hidden state has covariance one and mean zero."""
    rows = _rows(block)
    rows[:, : block.config.hidden_size] *= block.attention_norm.cpu().double()
    q, k, _ = rows.split(_widths(block.config))
    return Statistics.of(to_complex(q, block.config.q_heads), to_complex(k, block.config.k_heads))


class _Observe:
    """`Attend` that sums the statistics of the queries and keys which pass through it, where `counted` is true."""

    def __init__(self, batch: int, counted: Tensor, sums: dict[int, Statistics]) -> None:
        self.attend, self.counted, self.sums = DenseAttend(batch), counted, sums

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        queries, keys = (to_complex(x[self.counted].flatten(1).T.cpu(), x.shape[1]) for x in (q, k))
        seen = Statistics.of(queries, keys)
        self.sums[layer] = self.sums[layer] + seen if layer in self.sums else seen
        return self.attend(layer, q, k, v, window)


@torch.no_grad()
def measure(model: Transformer, inputs: Tensor, targets: Tensor, *, batch: int = 8) -> list[Statistics]:
    """Statistics of every layer over a text.

    inputs, targets  [n, context] int64 as from `held_out_windows`; places whose target is -100 are not counted
    """
    sums: dict[int, Statistics] = {}
    device = model.embed.device
    for x, y in zip(inputs.to(device).split(batch), targets.to(device).split(batch), strict=True):
        positions = torch.arange(x.shape[1], device=device).repeat(len(x))
        model(x.flatten(), positions, _Observe(len(x), y.flatten() != -100, sums))
    return [sums[layer] for layer in range(model.config.layers)]


def _write(old: Block, new: Block, merge: Merge) -> None:
    """Fill the q, k and v rows of a merged block from those of the original."""
    q, k, v = _rows(old).split(_widths(old.config))
    queries, keys = to_complex(q, old.config.q_heads), to_complex(k, old.config.k_heads)
    rows = torch.cat([to_rows(merge.fold_queries(queries)), to_rows(merge.shared_keys(keys)), v])
    if new.qkv.bias is not None:
        new.qkv.bias.copy_(rows[:, -1])
        rows = rows[:, :-1]
    new.qkv.weight.copy_(rows)


def _rows(block: Block) -> Tensor:
    """The rows of q, k and v, a bias as the last column of them: [Wq + Wk + Wv, n] float64 on the CPU."""
    parts = [block.qkv.weight] if block.qkv.bias is None else [block.qkv.weight, block.qkv.bias[:, None]]
    return torch.cat([part.detach().cpu().double() for part in parts], 1)


def _widths(config: ModelConfig) -> tuple[int, int, int]:
    return config.q_width, config.k_width, config.v_width


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]
