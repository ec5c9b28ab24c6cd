# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Selective V on the GPU (v_top_k): all keys are scored, then only the chosen rows of V are read.

Layout   a scoring program takes one new token, the G query heads of one K head and BLOCK_N cached tokens; its scores
         go to a float32 buffer [rows, Hq, max_context]. torch.topk chooses; a gathering program per row and query
         head reads the chosen rows of V, CHUNK at a time.
Bound    memory: all of K, then at most k rows of V per query head; the scores cost 8 * Hq bytes per cached token.
Grid     fixed by shapes alone (a CUDA graph holds); rows go in portions that keep the score buffer under BUFFER bytes.
Numerics float32; the logarithm of the sum covers all tokens, also those whose V is not read.
Not here sharing of V rows between the query heads of a V head: they meet in L2.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .gpu_pages import block_of_sequences, dot_type, largest_divisor, page_of, sequence_of, slot_of

BUFFER = 256 << 20
CHUNK = 32


@cache
def plan(Hq: int, Hk: int, Dk: int, page: int, q: torch.dtype, k: torch.dtype, B: int) -> Plan:
    G = largest_divisor(Hq // Hk, 64)
    DK_PAD = max(16, triton.next_power_of_2(Dk))
    constants = {
        "HQ": Hq, "HK": Hk, "DK": Dk, "PAGE": page, "G": G, "M": max(16, triton.next_power_of_2(G)),
        "BLOCK_N": max(16, min(128, 8192 // DK_PAD)), "DK_PAD": DK_PAD, "BLOCK_B": block_of_sequences(B),
        "QK_TYPE": dot_type(q, k, scaled=False),
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=1)


@cache
def gather_plan(Hq: int, Hv: int, Dv: int, page: int, B: int) -> Plan:
    constants = {
        "HQ": Hq, "HV": Hv, "DV": Dv, "DV_PAD": max(16, triton.next_power_of_2(Dv)), "PAGE": page, "CHUNK": CHUNK,
        "BLOCK_B": block_of_sequences(B),
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=2)


@triton.jit
def score_kernel(
    q, k_cache, page_table, seq_lens, cu_seqlens_q, k_scales, scores,
    scale, window, T, B, P, max_pages, first_row, q_token, q_head, k_page, k_head, k_slot, table_row, score_head,
    HQ: tl.constexpr, HK: tl.constexpr, DK: tl.constexpr, PAGE: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, DK_PAD: tl.constexpr, BLOCK_B: tl.constexpr, QK_TYPE: tl.constexpr,
):  # fmt: skip
    UNIFORM: tl.constexpr = PAGE % BLOCK_N == 0
    first_head = tl.program_id(1) * G
    start = tl.program_id(2) * BLOCK_N
    t = first_row + tl.program_id(0)
    b, first, n, length = sequence_of(t, cu_seqlens_q, seq_lens, B, T, max_pages * PAGE, BLOCK_B)
    position = length - n + t - first
    if (start < length) & (start <= position) & (start + BLOCK_N > position - window + 1):
        offs_n = tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, DK_PAD)
        head = tl.arange(0, M)
        q_rows = t.to(tl.int64) * q_token + (first_head + head) * q_head
        there_q = (head < G)[:, None] & (offs_k < DK)
        query = tl.load(q + q_rows[:, None] + offs_k, mask=there_q, other=0.0).to(QK_TYPE)

        table = page_table + b.to(tl.int64) * table_row
        page = page_of(table, start, offs_n, max_pages, P, PAGE, UNIFORM)
        slot = slot_of(start, offs_n, PAGE, UNIFORM)
        j = start + offs_n
        behind = position - j
        seen = (behind >= 0) & (behind < window) & (j < length)
        there = seen & (j < tl.where(page >= 0, length, 0))
        k_head_index = first_head * HK // HQ
        k_rows = k_head_index.to(tl.int64) * k_head + page.to(tl.int64) * k_page + slot * k_slot
        k = tl.load(k_cache + k_rows[:, None] + offs_k, mask=there[:, None] & (offs_k < DK), other=0.0)
        factor = tl.where(page >= 0, scale, float("nan")) + tl.zeros([BLOCK_N], tl.float32)
        if k_scales is not None:
            k_row = (page.to(tl.int64) * HK + k_head_index) * PAGE + slot
            factor *= tl.load(k_scales + k_row, mask=there, other=0.0)
        s = tl.dot(query, tl.trans(k.to(QK_TYPE)), input_precision="tf32x3") * factor[None, :]
        target = (tl.program_id(0).to(tl.int64) * HQ + first_head + head) * score_head
        tl.store(scores + target[:, None] + j, s, mask=(head < G)[:, None] & seen)


@triton.jit
def gather_kernel(
    chosen, shares, v_cache, v_scales, page_table, seq_lens, cu_seqlens_q, out,
    first_row, kept, T, B, P, max_pages, v_page, v_head, v_slot, table_row,
    HQ: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t = first_row + tl.program_id(0)
    b, _first, _n, _length = sequence_of(t, cu_seqlens_q, seq_lens, B, T, max_pages * PAGE, BLOCK_B)
    table = page_table + b.to(tl.int64) * table_row
    row = (tl.program_id(0).to(tl.int64) * HQ + head) * kept
    v_head_index = head * HV // HQ
    offs_v = tl.arange(0, DV_PAD)
    sums = tl.zeros([DV_PAD], tl.float32)
    for start in range(0, kept, CHUNK):
        i = start + tl.arange(0, CHUNK)
        share = tl.load(shares + row + i, mask=i < kept, other=0.0)
        j = tl.load(chosen + row + i, mask=i < kept, other=0).to(tl.int32)
        page = page_of(table, 0, j, max_pages, P, PAGE, False)
        there = (share > 0.0) & (page >= 0)
        v_rows = v_head_index.to(tl.int64) * v_head + page.to(tl.int64) * v_page + j % PAGE * v_slot
        v = tl.load(v_cache + v_rows[:, None] + offs_v, mask=there[:, None] & (offs_v < DV), other=0.0)
        if v_scales is not None:
            v_row = (page.to(tl.int64) * HV + v_head_index) * PAGE + j % PAGE
            share *= tl.load(v_scales + v_row, mask=there, other=0.0)
        sums += tl.sum(share[:, None] * v.to(tl.float32), 0)
    target = (t.to(tl.int64) * HQ + head) * DV
    tl.store(out + target + offs_v, sums.to(out.dtype.element_ty), mask=offs_v < DV)


def select(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    k_scales: Tensor | None, v_scales: Tensor | None, scale: float, window: int, out: Tensor, lse: Tensor,
    *, v_top_k: int, renormalise: bool,
) -> None:  # fmt: skip
    """Fill `out` and `lse`, reading V only at each row's v_top_k most probable tokens."""
    T, Hq, Dk = q.shape
    B, context = seq_lens.shape[0], page_table.shape[1] * k_cache.shape[2]
    P, Hk, page = k_cache.shape[:3]
    Hv, Dv = v_cache.shape[1], v_cache.shape[3]
    score, gather = plan(Hq, Hk, Dk, page, q.dtype, k_cache.dtype, B), gather_plan(Hq, Hv, Dv, page, B)
    kept = min(v_top_k, context)
    tables = page_table, seq_lens, cu_seqlens_q
    portion = max(1, BUFFER // (4 * Hq * context))
    blocks = triton.cdiv(context, score.constants["BLOCK_N"])
    for first_row in range(0, T, portion):
        rows = min(portion, T - first_row)
        scores = torch.full((rows, Hq, context), -torch.inf, dtype=torch.float32, device=q.device)
        score_kernel[rows, Hq // score.constants["G"], blocks](
            q, k_cache, *tables, k_scales, scores, scale, window, T, B, P, page_table.shape[1], first_row,
            *q.stride()[:2], *k_cache.stride()[:3], page_table.stride(0), context,
            **score.constants, num_warps=score.num_warps, num_stages=score.num_stages,
        )  # fmt: skip
        sums = lse[first_row : first_row + rows]
        torch.logsumexp(scores, -1, out=sums)
        best, chosen = scores.topk(kept)
        shares = torch.where(best == -torch.inf, 0.0, (best - sums[..., None]).exp())
        if renormalise:
            shares /= shares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        gather_kernel[rows, Hq](
            chosen, shares, v_cache, v_scales, *tables, out, first_row, kept, T, B, P, page_table.shape[1],
            *v_cache.stride()[:3], page_table.stride(0),
            **gather.constants, num_warps=gather.num_warps, num_stages=gather.num_stages,
        )  # fmt: skip
