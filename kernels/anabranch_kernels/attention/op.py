"""Dense attention whose K and V may differ in number and width of heads: schema, checks, gradients.

Training and scoring use it; generation reads a paged cache (paged_attention) and needs no gradients.
Forward and backward are two ops; a torch.autograd.Function ties them together when a gradient is asked for.
"""

from collections.abc import Callable
from importlib import import_module
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anabranch_kernels.attention import cpu, reference
from anabranch_kernels.library import define
from anabranch_kernels.tensors import sum_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_forward = define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, int? window) -> (Tensor, Tensor)",
    reference=reference.attention_forward,
    cpu=cpu.attention_forward,
    cuda=lambda *args: import_module(".gpu", __package__).attention_forward(*args),
    fake=lambda q, k, v, causal, scale, window: (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=sum_dtype(q)),
    ),
)

_backward = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "bool causal, float scale, int? window) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    cpu=cpu.attention_backward,
    cuda=lambda *args: import_module(".gpu", __package__).attention_backward(*args),
    fake=lambda grad, q, k, v, out, lse, causal, scale, window: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    ),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
        out: Tensor
        out, lse = _forward(q, k, v, causal, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = (causal, scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.mask), None, None, None)


_differentiable: Callable[..., Tensor] = _Attention.apply


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Softmax attention in which every query head finds its own K head and its own V head.

    q        [B, T, Hq, Dk]  float64, float32, bfloat16 or float16; on a GPU float64 takes the reference
    k        [B, S, Hk, Dk]  dtype and device of q; query head i reads K head i * Hk // Hq
    v        [B, S, Hv, Dv]  dtype and device of q; query head i reads V head i * Hv // Hq
    causal   query a sees keys j <= S - T + a: the last query sees every key
    scale    of the scores; 1/sqrt(Dk) if None
    window   query a sees only the last `window` of those keys; needs causal
    returns  [B, T, Hq, Dv]  dtype of q; differentiable once in q, k and v

    Raises ValueError for ranks, dtypes, devices, heads or lengths that do not fit.
    DiffQKV of Sigma, arXiv 2501.13629; Hk and Hv each divide Hq, nothing else ties them.
    """
    _check(q, k, v, causal, window)
    scale = 1 / sqrt(q.shape[3]) if scale is None else scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _differentiable(q, k, v, causal, scale, window)
    out: Tensor = _forward(q, k, v, causal, scale, window)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> None:
    for name, x, shape in (("q", q, "[B, T, Hq, Dk]"), ("k", k, "[B, S, Hk, Dk]"), ("v", v, "[B, S, Hv, Dv]")):
        if x.ndim != 4:
            raise ValueError(f"{name} must be {shape}, got {list(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"q, k and v must share one dtype of {list(DTYPES)}, got {q.dtype}, {k.dtype}, {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    B, T, Hq, Dk = q.shape
    S, Hk = k.shape[1:3]
    Hv, Dv = v.shape[2:]
    if k.shape[0] != B or v.shape[0] != B or v.shape[1] != S:
        raise ValueError(f"B and S must agree, got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if k.shape[3] != Dk:
        raise ValueError(f"q and k must have one head width Dk, got {Dk} and {k.shape[3]}")
    if min(Hq, Hk, Hv, Dk, Dv) < 1:
        raise ValueError(f"heads and head widths must be positive, got {Hq=}, {Hk=}, {Hv=}, {Dk=}, {Dv=}")
    if Hq % Hk or Hq % Hv:
        raise ValueError(f"Hq must be a multiple of Hk and of Hv, got {Hq=}, {Hk=}, {Hv=}")
    if causal and T > S:
        raise ValueError(f"causal attention needs T <= S: its queries are the last T of the S tokens, got {T=}, {S=}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True, got {window=}, {causal=}")
