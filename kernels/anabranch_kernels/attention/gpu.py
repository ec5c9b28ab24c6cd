# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Dense attention for training on the GPU: forward, and a backward that adds no two results in an unknown order.

Layout   forward and dQ: a program has BLOCK_M queries of one head and walks over the keys. dK and dV: a program has
         BLOCK_N keys of one group, the smallest run of query heads that shares heads with no other run (Hq /
         gcd(Hk, Hv) of them), and walks over its heads and their queries; the sums are written whenever the next query
         head has another K (or V) head. So nothing is expanded, no sum is atomic, and two runs agree bit for bit.
Bound    compute: 4 products forward and 10 backward (two of them again for dQ), on the tensor cores.
Numerics float32 sums, base-2 exponentials; p and ds are rounded to the inputs' dtype before they meet the next product.
Not here float64: tensor cores have no use for it, the launcher takes the reference, on purpose.
"""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan, on_its_device
from ..tensors import dense_rows
from . import reference

LOG2E = 1.4426950408889634

# Dk + Dv (three times that in float32, whose products are three of tf32) -> queries, keys, warps, stages of a program.
TILES = {
    "forward": ((128, (128, 128, 8, 3)), (256, (128, 64, 8, 3)), (512, (64, 32, 4, 2)), (1 << 30, (16, 16, 8, 2))),
    "dq": ((128, (128, 64, 8, 2)), (256, (128, 64, 8, 2)), (512, (64, 32, 4, 2)), (1 << 30, (16, 16, 8, 2))),
    "dkv": ((128, (32, 128, 8, 2)), (256, (32, 64, 8, 2)), (512, (32, 32, 8, 2)), (1 << 30, (16, 16, 8, 2))),
}


@cache
def plan(kernel: str, Hq: int, Hk: int, Hv: int, Dk: int, Dv: int, dtype: torch.dtype, *, causal: bool) -> Plan:
    """Launch of "forward", "dq" or "dkv"."""
    DK_PAD, DV_PAD = (max(16, triton.next_power_of_2(D)) for D in (Dk, Dv))
    weight = (DK_PAD + DV_PAD) * (3 if dtype == torch.float32 else 1)
    rows, keys, warps, stages = next(tile for limit, tile in TILES[kernel] if weight <= limit)
    constants = {
        "HQ": Hq, "HK": Hk, "HV": Hv, "DK": Dk, "DV": Dv, "DK_PAD": DK_PAD, "DV_PAD": DV_PAD, "CAUSAL": causal,
        "BLOCK_M": rows, "BLOCK_N": keys,
    }  # fmt: skip
    if kernel == "dkv":
        constants["GROUPS"] = gcd(Hk, Hv)
    return Plan(constants=constants, num_warps=warps, num_stages=stages)


@triton.jit
def _rows(x, head_offset, row, token_stride, limit, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows `row` of one head, [len(row), D_PAD], zeros outside [0, limit) and beyond D."""
    offs_d = tl.arange(0, D_PAD)
    rows = x + head_offset + row.to(tl.int64)[:, None] * token_stride + offs_d
    return tl.load(rows, mask=(row < limit)[:, None] & (offs_d < D), other=0.0)


@triton.jit
def _visible(row, key, T, S, window, CAUSAL: tl.constexpr):
    """Which of the keys each query sees, rows and keys in either axis; causal is aligned to the last key."""
    seen = (row < T) & (key < S)
    if CAUSAL:
        behind = row + (S - T) - key
        seen = seen & (behind >= 0) & (behind < window)
    return seen


@triton.jit
def _softmax_over(
    query, top, total, sums, begin, end, row, k, v, k_head, v_head, k_token, v_token, scale, window, T, S,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = _rows(k, k_head, key, k_token, S, DK, DK_PAD)
        values = _rows(v, v_head, key, v_token, S, DV, DV_PAD)
        s = tl.dot(query, tl.trans(keys), input_precision="tf32x3") * scale
        if MASKED:
            s = tl.where(_visible(row[:, None], key[None, :], T, S, window, CAUSAL), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision="tf32x3")
        top = new_top
    return top, total, sums


@triton.jit
def forward_kernel(
    q, k, v, out, lse, scale, window, T, S,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    row = first + tl.arange(0, BLOCK_M)
    query = _rows(q, batch * q_batch + head * q_head, row, q_token, T, DK, DK_PAD)
    k_at = batch * k_batch + (head * HK // HQ) * k_head
    v_at = batch * v_batch + (head * HV // HQ) * v_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    begin = 0
    end = S
    whole = S // BLOCK_N * BLOCK_N  # tiles below this are seen by every row
    if CAUSAL:
        begin = tl.maximum(first + S - T - window + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M + S - T, S)
        whole = tl.where(window > S, (first + S - T + 1) // BLOCK_N * BLOCK_N, begin)
    top, total, sums = _softmax_over(
        query, top, total, sums, begin, whole, row, k, v, k_at, v_at, k_token, v_token, scale, window, T, S,
        DK, DV, DK_PAD, DV_PAD, BLOCK_N, CAUSAL, False,
    )  # fmt: skip
    top, total, sums = _softmax_over(
        query, top, total, sums, whole, end, row, k, v, k_at, v_at, k_token, v_token, scale, window, T, S,
        DK, DV, DK_PAD, DV_PAD, BLOCK_N, CAUSAL, True,
    )  # fmt: skip
    offs_v = tl.arange(0, DV_PAD)
    target = (batch * T + row) * HQ + head
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = (row < T)[:, None] & (offs_v < DV)
    tl.store(out + target[:, None] * DV + offs_v, result.to(out.dtype.element_ty), mask=inside)
    LN2: tl.constexpr = 0.6931471805599453
    tl.store(lse + target, (top + tl.log2(total)) * LN2, mask=row < T)


@triton.jit
def dq_kernel(
    grad, q, k, v, out, lse, delta, dq, scale, window, T, S,
    g_batch, g_token, g_head, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head; on the way delta = <grad, out> of each row, which dkv_kernel needs."""
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    query = _rows(q, batch * q_batch + head * q_head, row, q_token, T, DK, DK_PAD)
    g = _rows(grad, batch * g_batch + head * g_head, row, g_token, T, DV, DV_PAD)
    o = _rows(out, (batch * T * HQ + head) * DV, row, HQ * DV, T, DV, DV_PAD)
    k_at = batch * k_batch + (head * HK // HQ) * k_head
    v_at = batch * v_batch + (head * HV // HQ) * v_head
    flat = (batch * T + row) * HQ + head
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + flat, row_delta, mask=row < T)
    row_lse = tl.load(lse + flat, mask=row < T, other=0.0) * 1.4426950408889634
    sums = tl.zeros([BLOCK_M, DK_PAD], tl.float32)
    begin = 0
    end = S
    if CAUSAL:
        begin = tl.maximum(first + S - T - window + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M + S - T, S)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        keys = _rows(k, k_at, key, k_token, S, DK, DK_PAD)
        values = _rows(v, v_at, key, v_token, S, DV, DV_PAD)
        s = tl.dot(query, tl.trans(keys), input_precision="tf32x3") * (scale * 1.4426950408889634)
        p = tl.where(_visible(row[:, None], key[None, :], T, S, window, CAUSAL), tl.exp2(s - row_lse[:, None]), 0.0)
        dp = tl.dot(g, tl.trans(values), input_precision="tf32x3")
        ds = p * (dp - row_delta[:, None])
        sums = tl.dot(ds.to(keys.dtype), keys, sums, input_precision="tf32x3")
    offs_k = tl.arange(0, DK_PAD)
    inside = (row < T)[:, None] & (offs_k < DK)
    tl.store(dq + flat[:, None] * DK + offs_k, (sums * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def dkv_kernel(
    grad, q, k, v, lse, delta, dk, dv, scale, window, T, S,
    g_batch, g_token, g_head, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one group: the sums of a K or V head end with its last query head."""
    HEADS: tl.constexpr = HQ // GROUPS
    first_head = tl.program_id(0) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, DK_PAD)
    offs_v = tl.arange(0, DV_PAD)
    begin = 0
    end = T
    if CAUSAL:
        begin = tl.maximum(start - (S - T), 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(start + BLOCK_N - 1 - (S - T) + window, T)
    k_sums = tl.zeros([BLOCK_N, DK_PAD], tl.float32)
    v_sums = tl.zeros([BLOCK_N, DV_PAD], tl.float32)
    for head in range(first_head, first_head + HEADS):
        k_index = head * HK // HQ
        v_index = head * HV // HQ
        keys = _rows(k, batch * k_batch + k_index * k_head, key, k_token, S, DK, DK_PAD)
        values = _rows(v, batch * v_batch + v_index * v_head, key, v_token, S, DV, DV_PAD)
        for first in range(begin, end, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            query = _rows(q, batch * q_batch + head * q_head, row, q_token, T, DK, DK_PAD)
            g = _rows(grad, batch * g_batch + head * g_head, row, g_token, T, DV, DV_PAD)
            flat = (batch * T + row) * HQ + head
            row_lse = tl.load(lse + flat, mask=row < T, other=0.0) * 1.4426950408889634
            row_delta = tl.load(delta + flat, mask=row < T, other=0.0)
            s = tl.dot(keys, tl.trans(query), input_precision="tf32x3") * (scale * 1.4426950408889634)
            seen = _visible(row[None, :], key[:, None], T, S, window, CAUSAL)
            p = tl.where(seen, tl.exp2(s - row_lse[None, :]), 0.0)
            v_sums = tl.dot(p.to(g.dtype), g, v_sums, input_precision="tf32x3")
            dp = tl.dot(values, tl.trans(g), input_precision="tf32x3")
            ds = p * (dp - row_delta[None, :])
            k_sums = tl.dot(ds.to(query.dtype), query, k_sums, input_precision="tf32x3")
        if (head + 1) % (HQ // HK) == 0:
            target = ((batch * S + key) * HK + k_index)[:, None] * DK + offs_k
            inside = (key < S)[:, None] & (offs_k < DK)
            tl.store(dk + target, (k_sums * scale).to(dk.dtype.element_ty), mask=inside)
            k_sums = tl.zeros([BLOCK_N, DK_PAD], tl.float32)
        if (head + 1) % (HQ // HV) == 0:
            target = ((batch * S + key) * HV + v_index)[:, None] * DV + offs_v
            inside = (key < S)[:, None] & (offs_v < DV)
            tl.store(dv + target, v_sums.to(dv.dtype.element_ty), mask=inside)
            v_sums = tl.zeros([BLOCK_N, DV_PAD], tl.float32)


@on_its_device
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    (B, T, Hq, Dk), (S, Hk), (Hv, Dv) = q.shape, k.shape[1:3], v.shape[2:]
    if q.dtype == torch.float64 or B * T * S == 0:
        return reference.attention_forward(q, k, v, causal, scale, window)
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out = q.new_empty(B, T, Hq, Dv)
    lse = q.new_empty(B, T, Hq, dtype=torch.float32)
    chosen = plan("forward", Hq, Hk, Hv, Dk, Dv, q.dtype, causal=causal)
    forward_kernel[Hq, triton.cdiv(T, chosen.constants["BLOCK_M"]), B](
        q, k, v, out, lse, scale * LOG2E, _reach(window, S), T, S,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return out, lse


def _reach(window: int | None, S: int) -> int:
    return S + 1 if window is None else min(window, S + 1)


@on_its_device
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
    (B, T, Hq, Dk), (S, Hk), (Hv, Dv) = q.shape, k.shape[1:3], v.shape[2:]
    if q.dtype == torch.float64 or B * T * S == 0:
        return reference.attention_backward(grad, q, k, v, out, lse, causal, scale, window)
    grad, q, k, v = (dense_rows(x) for x in (grad, q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    shared = scale, _reach(window, S), T, S
    strides = [stride for x in (grad, q, k, v) for stride in x.stride()[:3]]
    rows = plan("dq", Hq, Hk, Hv, Dk, Dv, q.dtype, causal=causal)
    dq_kernel[Hq, triton.cdiv(T, rows.constants["BLOCK_M"]), B](
        grad, q, k, v, out, lse, delta, dq, *shared, *strides,
        **rows.constants, num_warps=rows.num_warps, num_stages=rows.num_stages,
    )  # fmt: skip
    keys = plan("dkv", Hq, Hk, Hv, Dk, Dv, q.dtype, causal=causal)
    dkv_kernel[keys.constants["GROUPS"], triton.cdiv(S, keys.constants["BLOCK_N"]), B](
        grad, q, k, v, lse, delta, dk, dv, *shared, *strides,
        **keys.constants, num_warps=keys.num_warps, num_stages=keys.num_stages,
    )  # fmt: skip
    return dq, dk, dv
