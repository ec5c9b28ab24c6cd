"""Dense attention with unequal heads in plain torch, as the formulas read, float64 inside.

s[a, i, j] = scale <q[a, i], k[j, i // gk]>    p = softmax_j(s)    o[a, i] = sum_j p[a, i, j] v[j, i // gv]
Backward:  dV = p^T g    dp = g v^T    ds = p (dp - <g, o>)    dq = scale ds k    dK = scale ds^T q,
dK summed over the gk query heads of a K head and dV over the gv query heads of a V head.
"""

import torch
from torch import Tensor

from ..tensors import wide


def visible(T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[T, S] bool: which keys each query sees; causal is aligned to the last key."""
    row = torch.arange(T, device=device)[:, None] + (S - T)
    column = torch.arange(S, device=device)
    seen = column <= row if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    return seen if window is None else seen & (column > row - window)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    s = scale * torch.einsum("bthd,bshd->bhts", q, k)
    return s.masked_fill(~visible(T, S, causal, window, q.device), -torch.inf)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, Dv] in q's dtype and natural-log lse [B, T, Hq], float32 (float64 for float64 inputs)."""
    Hq = q.shape[2]
    K = wide(k).repeat_interleave(Hq // k.shape[2], 2)
    V = wide(v).repeat_interleave(Hq // v.shape[2], 2)
    s = _scores(wide(q), K, causal, scale, window)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    out = torch.einsum("bhts,bshd->bthd", p, V).to(q.dtype).contiguous()
    return out, lse.transpose(1, 2).to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


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
    """Gradients of q, k and v, each in its own shape and dtype."""
    gk, gv = q.shape[2] // k.shape[2], q.shape[2] // v.shape[2]
    Q, G = wide(q), wide(grad)
    K, V = wide(k).repeat_interleave(gk, 2), wide(v).repeat_interleave(gv, 2)
    p = (_scores(Q, K, causal, scale, window) - wide(lse).transpose(1, 2)[..., None]).exp()
    dp = torch.einsum("bthd,bshd->bhts", G, V)
    ds = scale * p * (dp - (G * wide(out)).sum(-1).transpose(1, 2)[..., None])
    dq = torch.einsum("bhts,bshd->bthd", ds, K)
    dk = torch.einsum("bhts,bthd->bshd", ds, Q).reshape(*k.shape[:3], gk, k.shape[3]).sum(3)
    dv = torch.einsum("bhts,bthd->bshd", p, G).reshape(*v.shape[:3], gv, v.shape[3]).sum(3)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
