# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Paged prefill on the GPU: chunks of new tokens of several sequences, packed, against their cached pages.

Layout   a program has BLOCK_M rows: BQ new tokens of one sequence times G query heads that share a K head and a V
         head. The programs of one K head run side by side, so that its tiles come from L2 after the first of them.
Bound    compute: 2 * (DK + DV) operations per row and visible token, on the tensor cores; whole tiles below the
         diagonal skip the mask.
Grid     T // BQ + B blocks of rows hold any split of T tokens over B sequences; a program finds its sequence from the
         row starts, and leaves when it has none, or one so short that gpu_decode.py took it. Late blocks, which see
         the most tokens, start first.
Numerics float32 sums, base-2 exponentials; int8 scales meet the scores (K) and the probabilities (V), not the tiles.
Not here a split over cached tokens: few new tokens after a very long prefix do not fill a large GPU.
"""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .gpu_pages import (
    LOG2E,
    block_of_sequences,
    dot_type,
    element_weight,
    largest_divisor,
    page_of,
    sequence_bounds,
    slot_of,
)

# Weight of one token in a tile, in 16-bit elements held in registers -> rows, tokens in a tile, warps, stages.
TILES = ((128, (128, 128, 8, 3)), (256, (128, 64, 8, 3)), (512, (64, 32, 4, 2)), (float("inf"), (32, 16, 4, 2)))


@cache
def plan(
    Hq: int, Hk: int, Hv: int, Dk: int, Dv: int, page: int, q: torch.dtype, k: torch.dtype, v: torch.dtype, B: int,
    *, windowed: bool,
) -> Plan:  # fmt: skip
    G = largest_divisor(gcd(Hq // Hk, Hq // Hv), 16)
    DK_PAD, DV_PAD = (max(16, triton.next_power_of_2(D)) for D in (Dk, Dv))
    weight = DK_PAD * element_weight(q, k, scaled=False) + DV_PAD * element_weight(q, v, scaled=True)
    if tl.float32 in (dot_type(q, k, scaled=False), dot_type(q, v, scaled=True)):
        weight *= 1.5  # a float32 product is three of tf32
    rows, block, warps, stages = next(tile for limit, tile in TILES if weight <= limit)
    constants = {
        "HQ": Hq, "HK": Hk, "HV": Hv, "DK": Dk, "DV": Dv, "PAGE": page, "G": G, "BQ": rows // G,
        "BLOCK_M": rows, "BLOCK_N": block, "DK_PAD": DK_PAD, "DV_PAD": DV_PAD,
        "BLOCK_B": block_of_sequences(B), "WINDOWED": windowed,
        "QK_TYPE": dot_type(q, k, scaled=False), "PV_TYPE": dot_type(q, v, scaled=True),
    }  # fmt: skip
    return Plan(constants=constants, num_warps=warps, num_stages=stages)


@triton.jit
def _attend(
    query, top, total, sums, begin, end, position, live, table, k_item, v_item, k_scales, v_scales,
    scale, window, P, max_pages, k_page, k_slot, v_page, v_slot, k_head_index, v_head_index,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    QK_TYPE: tl.constexpr, PV_TYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Softmax state after tokens [begin, end); MASKED where a row may not see all of a tile."""
    UNIFORM: tl.constexpr = PAGE % BLOCK_N == 0
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, DK_PAD)
    offs_v = tl.arange(0, DV_PAD)
    page = page_of(table, begin, offs_n, max_pages, P, PAGE, UNIFORM)
    for start in range(begin, end, BLOCK_N):
        next_page = page_of(table, start + BLOCK_N, offs_n, max_pages, P, PAGE, UNIFORM)
        j = start + offs_n
        slot = slot_of(start, offs_n, PAGE, UNIFORM)
        there = j < tl.where(page >= 0, end, 0)
        k_rows = page.to(tl.int64) * k_page + slot * k_slot
        k = tl.load(k_item + k_rows[:, None] + offs_k, mask=there[:, None] & (offs_k < DK), other=0.0)
        v_rows = page.to(tl.int64) * v_page + slot * v_slot
        v = tl.load(v_item + v_rows[:, None] + offs_v, mask=there[:, None] & (offs_v < DV), other=0.0)

        factor = tl.where(page >= 0, scale, float("nan")) + tl.zeros([BLOCK_N], tl.float32)
        if k_scales is not None:
            k_row = (page.to(tl.int64) * HK + k_head_index) * PAGE + slot
            factor *= tl.load(k_scales + k_row, mask=there, other=0.0)
        s = tl.dot(query, tl.trans(k.to(QK_TYPE)), input_precision="tf32x3") * factor[None, :]
        if MASKED:
            behind = position[:, None] - j[None, :]
            s = tl.where((behind >= 0) & (behind < window) & (j < end)[None, :] & live[:, None], s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, 1)
        if v_scales is not None:
            v_row = (page.to(tl.int64) * HV + v_head_index) * PAGE + slot
            p *= tl.load(v_scales + v_row, mask=there, other=0.0)[None, :]
        sums = sums * shrink[:, None]
        sums = tl.dot(p.to(PV_TYPE), v.to(PV_TYPE), sums, input_precision="tf32x3")
        top = new_top
        page = next_page
    return top, total, sums


@triton.jit
def prefill_kernel(
    q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, k_scales, v_scales, out, lse,
    scale, window, shortest, T, B, P, max_pages,
    q_token, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, table_row,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    G: tl.constexpr, BQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK_B: tl.constexpr, WINDOWED: tl.constexpr,
    QK_TYPE: tl.constexpr, PV_TYPE: tl.constexpr,
):  # fmt: skip
    first_head = tl.program_id(0) * G
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    offs_b = tl.arange(0, BLOCK_B)
    starts, _counts, _lengths = sequence_bounds(cu_seqlens_q, seq_lens, offs_b, B, T, max_pages * PAGE)
    b = tl.sum(((starts // BQ + offs_b <= block) & (offs_b < B)).to(tl.int32), 0) - 1
    first, n, length = sequence_bounds(cu_seqlens_q, seq_lens, b, B, T, max_pages * PAGE)
    earliest = (block - first // BQ - b) * BQ
    if (n >= shortest) & (earliest < n):
        row = tl.arange(0, BLOCK_M)
        token = earliest + row // G
        head = first_head + row % G
        live = (token < n) & (row < BQ * G)
        position = length - n + token
        offs_k = tl.arange(0, DK_PAD)
        offs_v = tl.arange(0, DV_PAD)
        q_rows = (first + token).to(tl.int64) * q_token + head * q_head
        query = tl.load(q + q_rows[:, None] + offs_k, mask=live[:, None] & (offs_k < DK), other=0.0).to(QK_TYPE)
        table = page_table + b.to(tl.int64) * table_row
        k_head_index = first_head * HK // HQ
        v_head_index = first_head * HV // HQ
        k_item = k_cache + k_head_index.to(tl.int64) * k_head
        v_item = v_cache + v_head_index.to(tl.int64) * v_head

        seen_by_first = length - n + earliest + 1
        end = length - n + tl.minimum(earliest + BQ, n)
        begin = tl.maximum(seen_by_first - window, 0) // BLOCK_N * BLOCK_N
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
        middle = begin
        if not WINDOWED:
            middle = tl.maximum(seen_by_first, 0) // BLOCK_N * BLOCK_N
            top, total, sums = _attend(
                query, top, total, sums, begin, middle, position, live, table, k_item, v_item, k_scales, v_scales,
                scale, window, P, max_pages, k_page, k_slot, v_page, v_slot, k_head_index, v_head_index,
                HK, HV, DK, DV, PAGE, BLOCK_N, DK_PAD, DV_PAD, QK_TYPE, PV_TYPE, False,
            )  # fmt: skip
        top, total, sums = _attend(
            query, top, total, sums, middle, end, position, live, table, k_item, v_item, k_scales, v_scales,
            scale, window, P, max_pages, k_page, k_slot, v_page, v_slot, k_head_index, v_head_index,
            HK, HV, DK, DV, PAGE, BLOCK_N, DK_PAD, DV_PAD, QK_TYPE, PV_TYPE, True,
        )  # fmt: skip

        LN2: tl.constexpr = 0.6931471805599453
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        target = (first + token).to(tl.int64) * HQ + head
        tl.store(lse + target, (top + tl.log2(total)) * LN2, mask=live)
        tl.store(
            out + target[:, None] * DV + offs_v,
            result.to(out.dtype.element_ty),
            mask=live[:, None] & (offs_v < DV),
        )


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    k_scales: Tensor | None, v_scales: Tensor | None, scale: float, window: int, out: Tensor, lse: Tensor,
    *, shortest: int, tuned: Plan | None = None,
) -> None:  # fmt: skip
    """Fill `out` and `lse` for sequences of at least `shortest` new tokens."""
    T, Hq, Dk = q.shape
    B = seq_lens.shape[0]
    P, Hk, page = k_cache.shape[:3]
    Hv, Dv = v_cache.shape[1], v_cache.shape[3]
    windowed = window <= page_table.shape[1] * page
    types = q.dtype, k_cache.dtype, v_cache.dtype
    chosen = tuned or plan(Hq, Hk, Hv, Dk, Dv, page, *types, B, windowed=windowed)
    G, BQ = chosen.constants["G"], chosen.constants["BQ"]
    prefill_kernel[Hq // G, T // BQ + B](
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, k_scales, v_scales, out, lse,
        scale * LOG2E, window, shortest, T, B, P, page_table.shape[1],
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
