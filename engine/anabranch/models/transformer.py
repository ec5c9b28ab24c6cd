"""The decoder-only transformer: one definition of the block for every family, and the only place layers are stacked.

A model knows nothing of caches or batches. It is given tokens with their positions and a function that attends, so
that training (dense sequences) and serving (paged caches) run the same code.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.models.config import ModelConfig
from anabranch.models.layers import Linear, linear, rms_norm, silu_mul
from anabranch.models.rotary import rotary_frequencies, rotate
from anabranch.models.shard import Group, Shard, cut
from anabranch_kernels.attention.op import attention


class Attend(Protocol):
    """What a block asks for: the new tokens' attention over everything they may see, themselves included."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, Hq, Dk], k [T, Hk, Dk] (both rotated), v [T, Hv, Dv] -> [T, Hq, Dv]; window None sees all tokens.

        The three may be strided views of one tensor. Scores are scaled by 1/sqrt(Dk).
        """
        ...


class DenseAttend:
    """Attention within sequences of equal length, nothing cached and gradients kept: for training and scoring.

    The T tokens of a call are `batch` sequences of T / batch, one after another.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if q.shape[0] % self.batch:
            raise ValueError(f"T must be a multiple of the batch {self.batch}, got {q.shape[0]} tokens")
        q, k, v = (x.unflatten(0, (self.batch, -1)) for x in (q, k, v))
        return attention(q, k, v, window=window).flatten(0, 1)


class PackedAttend:
    """Attention within pieces that lie one after another, nothing cached and gradients kept: for packed examples."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        pieces = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attention(q[None], k[None], v[None], window=window)[0] for q, k, v in pieces])


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward. Matrices that read the same input are stored as one.

    In a group the block holds one rank's part, and every result that all of them contribute to is summed.
    """

    def __init__(
        self, shard: Shard, layer: int, dtype: torch.dtype, device: torch.device, group: Group | None = None
    ) -> None:
        super().__init__()
        config = shard.config
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        self.group, self.q_columns = group, slice(shard.q_columns.start, shard.q_columns.stop)
        hidden, q_width = config.hidden_size, len(shard.q_proj)
        once = group is None or group.rank == 0  # who adds the bias of a sum over ranks
        matrix = partial(Linear, dtype=dtype, device=device)
        vector = partial(torch.empty, dtype=dtype, device=device)
        self.attention_norm = nn.Parameter(vector(hidden))
        self.split_qkv = (q_width + config.k_width, config.v_width)
        self.split_qk = (q_width, config.k_width)
        self.split_heads = (config.q_heads, config.k_heads)
        self.qkv = matrix(hidden, sum(self.split_qkv), bias=config.qkv_bias)
        if config.q_intermediate_size is not None:
            self.augq_gate_up = matrix(q_width, 2 * config.q_intermediate_size, bias=False)
            self.augq_down = matrix(config.q_intermediate_size, q_width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.Parameter(vector(config.k_dim))
            self.k_norm = nn.Parameter(vector(config.k_dim))
        self.o = matrix(config.o_width, hidden, bias=config.o_bias and once)
        self.ffn_norm = nn.Parameter(vector(hidden))
        self.gate_up = matrix(hidden, 2 * config.ffn_size, bias=config.mlp_bias)
        self.down = matrix(config.ffn_size, hidden, bias=config.mlp_bias and once)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        eps = self.config.norm_eps
        q, k, v = self.project(rms_norm(x, self.attention_norm, eps), cos, sin)
        attended: Tensor = self.o(attend(self.layer, q, k, v, self.window).flatten(1))
        x = x + (attended if self.group is None else self.group.all_reduce(attended))
        ffn: Tensor = self.down(silu_mul(self.gate_up(rms_norm(x, self.ffn_norm, eps))))
        return x + (ffn if self.group is None else self.group.all_reduce(ffn))

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, hidden] -> q [T, Hq, Dk] and k [T, Hk, Dk] turned to their positions, v [T, Hv, Dv]."""
        c, T = self.config, h.shape[0]
        qk, v = self.qkv(h).split_with_sizes(self.split_qkv, -1)
        if c.q_intermediate_size is not None:
            qk = self.augment(qk)
        heads = qk.view(T, c.q_heads + c.k_heads, c.k_dim)
        if c.qk_norm:
            q, k = heads.split_with_sizes(self.split_heads, 1)
            heads = torch.cat([rms_norm(q, self.q_norm, c.norm_eps), rms_norm(k, self.k_norm, c.norm_eps)], 1)
        q, k = rotate(heads, cos, sin).split_with_sizes(self.split_heads, 1)
        return q, k, v.view(T, c.v_heads, c.v_dim)

    def augment(self, qk: Tensor) -> Tensor:
        """Replace q0 of [q0 | k] by its gated MLP: the augmented query of Sigma, arXiv 2501.13629."""
        q0, k = qk.split_with_sizes(self.split_qk, -1)
        q: Tensor = self.augq_down(silu_mul(self.augq_gate_up(q0)))
        if self.group is not None:  # q0 is whole on every rank
            q0, q = q0[:, self.q_columns], self.group.all_reduce(q)[:, self.q_columns]
        return torch.cat([q0 + q if self.config.augq_residual else q, k], -1)


class Transformer(nn.Module):
    """A decoder-only language model with uninitialised weights: call `initialise`, or fill it with `load_model`.

    config   of the whole model. The attribute of that name has the head counts and inner widths of the part held here
    group    the ranks that share the model; this one then holds `shard`, a part of it. None: all is here
    """

    rotary: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Group | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.group = group
        self.shard = cut(config, 0, 1) if group is None else cut(config, group.rank, group.size)
        self.config = self.shard.config
        V, hidden = config.vocab_size, config.hidden_size
        self.embed = nn.Parameter(torch.empty(V, hidden, dtype=dtype, device=device))
        self.blocks = nn.ModuleList(Block(self.shard, layer, dtype, device, group) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.empty(hidden, dtype=dtype, device=device))
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(len(self.shard.vocab), hidden, dtype=dtype, device=device))
        self._place_rotary()

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens [T] int64 at positions [T] int64 of their sequences -> hidden [T, hidden_size] after the last norm."""
        x = F.embedding(tokens, self.embed)
        angles = positions[:, None, None] * self.rotary  # float32 [T, 1, Dk]
        cos, sin = angles.cos(), angles.sin()
        scaling = self.config.rope_scaling
        if scaling is not None and scaling.attention_factor != 1.0:
            cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return rms_norm(x, self.norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden_size] -> scores of every token [n, vocab_size], float32; in a group on rank 0 alone."""
        weight: Tensor = self.embed if self.config.tie_embeddings else self.head
        if self.group is None:
            return linear(hidden, weight).float()
        if self.config.tie_embeddings:
            weight = weight[self.shard.vocab.start : self.shard.vocab.stop]
        return self.group.gather(linear(hidden, weight), self.config.vocab_size).float()

    def initialise(self, generator: torch.Generator, std: float = 0.02) -> Self:
        """Fill every weight for training: normal with `std`, norms one, biases zero.

        Matrices that write to the residual stream (o, down) get std / sqrt(2 * layers), as in GPT-2, so that the
        stream's variance does not grow with depth. The generator must be on the model's device. Returns self.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                residual = name.endswith((".o.weight", ".down.weight"))
                nn.init.normal_(
                    parameter, std=std / math.sqrt(2 * self.config.layers) if residual else std, generator=generator
                )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts reach every weight; the angles stay float32, for bfloat16 cannot count past 256."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_rotary()
        return self

    def _place_rotary(self) -> None:
        config = self.config
        self.rotary = rotary_frequencies(config.k_dim, config.rope_theta, config.rope_scaling).to(self.embed.device)
