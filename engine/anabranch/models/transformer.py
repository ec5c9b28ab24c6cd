"""The decoder-only transformer: one definition of the block for every family, and the only place layers are stacked.

A model knows nothing of caches or batches. It is given tokens with their positions and a function that attends, so
that training (dense sequences) and serving (paged caches) run the same code.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.models.config import ModelConfig
from anabranch.models.layers import Linear, linear, rms_norm, silu_mul
from anabranch.models.rotary import rotary_frequencies, rotate
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


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward. Matrices that read the same input are stored as one."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        hidden = config.hidden_size
        matrix = partial(Linear, dtype=dtype, device=device)
        vector = partial(torch.empty, dtype=dtype, device=device)
        self.attention_norm = nn.Parameter(vector(hidden))
        self.split_qkv = (config.q_width + config.k_width, config.v_width)
        self.split_heads = (config.q_heads, config.k_heads)
        self.qkv = matrix(hidden, sum(self.split_qkv), bias=config.qkv_bias)
        if config.q_intermediate_size is not None:
            self.augq_gate_up = matrix(config.q_width, 2 * config.q_intermediate_size, bias=False)
            self.augq_down = matrix(config.q_intermediate_size, config.q_width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.Parameter(vector(config.k_dim))
            self.k_norm = nn.Parameter(vector(config.k_dim))
        self.o = matrix(config.o_width, hidden, bias=config.o_bias)
        self.ffn_norm = nn.Parameter(vector(hidden))
        self.gate_up = matrix(hidden, 2 * config.ffn_size, bias=config.mlp_bias)
        self.down = matrix(config.ffn_size, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        eps = self.config.norm_eps
        q, k, v = self.project(rms_norm(x, self.attention_norm, eps), cos, sin)
        x = x + self.o(attend(self.layer, q, k, v, self.window).flatten(1))
        ffn: Tensor = self.down(silu_mul(self.gate_up(rms_norm(x, self.ffn_norm, eps))))
        return x + ffn

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
        q0, k = qk.split_with_sizes((self.config.q_width, self.config.k_width), -1)
        q = self.augq_down(silu_mul(self.augq_gate_up(q0)))
        return torch.cat([q0 + q if self.config.augq_residual else q, k], -1)


class Transformer(nn.Module):
    """A decoder-only language model with uninitialised weights: call `initialise`, or fill it with `load_model`."""

    rotary: Tensor

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.blocks = nn.ModuleList(Block(config, layer, dtype, device) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype, device=device))
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
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
        """hidden [n, hidden_size] -> scores of every token [n, vocab_size], float32."""
        return linear(hidden, self.embed if self.config.tie_embeddings else self.head).float()

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
