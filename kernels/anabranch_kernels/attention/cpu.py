"""Dense attention on the CPU: torch's own flash kernels on K and V expanded to one number of heads.

Layout   torch wants [B, H, T, D] with one head count for K and V (a divisor of Hq) and one width: both are repeated up
         to the least common multiple of Hk and Hv, the narrower of Dk and Dv is padded with zeros, which change neither
         scores nor gradients of what is kept.
Bound    compute: training reads each row T times, so the expanded copy (T rows written once) does not show.
Numerics torch's: float32 sums for bfloat16 and float16, float64 for float64.
Not here windows and T < S without a mask: torch aligns its causal flag to the first key, so those take a mask.
"""

from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from anabranch_kernels.attention.reference import visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _expand(x: Tensor, heads: int, width: int) -> Tensor:
    """[B, S, H, D] -> [B, heads, S, width], rows of unit stride."""
    x = x.repeat_interleave(heads // x.shape[2], 2) if heads > x.shape[2] else x
    x = pad(x, (0, width - x.shape[3])) if width > x.shape[3] else x
    return (x if x.stride(3) == 1 else x.contiguous()).transpose(1, 2)


def _fold(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient [B, heads, S, width] over the copies of each head of `like` [B, S, H, D]."""
    grad = grad[..., : like.shape[3]].transpose(1, 2)
    shared = grad.shape[2] // like.shape[2]
    if shared > 1:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad = grad.reshape(*like.shape[:3], shared, like.shape[3]).sum(3, dtype=wide)
    return grad.to(like.dtype).contiguous()


def _mask(q: Tensor, S: int, causal: bool, window: int | None) -> tuple[bool, Tensor | None]:
    T = q.shape[1]
    if not causal or (T == S and window is None):
        return causal, None
    hidden = ~visible(T, S, causal, window, q.device)
    return False, q.new_zeros(T, S).masked_fill_(hidden, -torch.inf)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    S, Dv = v.shape[1], v.shape[3]
    if B * T * S == 0:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(B, T, Hq, Dv), q.new_full((B, T, Hq), -torch.inf, dtype=wide)
    width = max(q.shape[3], Dv)
    is_causal, mask = _mask(q, S, causal, window)
    heads = lcm(k.shape[2], v.shape[2])
    wide_q, wide_k, wide_v = _expand(q, Hq, width), _expand(k, heads, width), _expand(v, heads, width)
    out, lse = _flash(wide_q, wide_k, wide_v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out[..., :Dv].transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    Hq, S, heads = q.shape[2], k.shape[1], lcm(k.shape[2], v.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    width = max(q.shape[3], v.shape[3])
    is_causal, mask = _mask(q, S, causal, window)
    wide = [_expand(x, H, width) for x, H in ((grad, Hq), (q, Hq), (k, heads), (v, heads), (out, Hq))]
    gradients = _flash_backward(*wide, lse.transpose(1, 2), 0.0, is_causal, attn_mask=mask, scale=scale)
    dq, dk, dv = (_fold(g, like) for g, like in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv
