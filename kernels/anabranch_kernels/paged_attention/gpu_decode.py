# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Paged decode on the GPU: split-KV, one K head and its V heads to a program, partial results merged in order.

Layout   a work unit is (sequence, ROWS query heads that share a K head and R V heads, a stretch of its tokens, a block
         of QT new tokens). K of a tile is read once for all ROWS query heads; the R values of a token are read as one
         row of R * DV columns and multiplied with every probability; of row i only the columns of its own V head are
         kept. The product is R times too large and free: it waits for memory.
Bound    memory: DK + R * DV elements per token and K head, once. A program keeps two tiles in flight behind the one it
         works on, two programs share a multiprocessor.
Grid     a fixed number of programs takes the units in turn; a program finds its unit in the running sum of the units
         of all sequences. Nothing the grid depends on lives on the device, so a CUDA graph holds for any lengths. A
         stretch depends on its own sequence alone, so a result does not depend on the rest of the batch, bit for bit.
Numerics float32 sums, base-2 exponentials; int8 scales meet the scores (K) and the probabilities (V), not the tiles.
Not here long chunks of new tokens (gpu_prefill.py), v_top_k (gpu_select.py).
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
    sequence_of,
    slot_of,
)

# Weight of one token in a tile, in 16-bit elements held in registers -> tokens in a tile.
TILES = ((160, 128), (320, 64), (640, 32), (float("inf"), 16))
# Two programs share a multiprocessor and may have all its registers. Each keeps two tiles on their way, 20 to 80 KiB:
# what an H200 needs there, latency times bandwidth, is 25 KiB.
PROGRAMS_PER_SM = 2
SHORT = 4  # new tokens of a sequence up to which this kernel takes it from a mixed batch
TARGET_UNITS = 256  # a lone sequence should fill a large GPU: about two units for each of its multiprocessors


def heads_per_unit(Hq: int, Hk: int, Hv: int, Dv: int) -> tuple[int, int]:
    """Query heads (ROWS) and V heads (R) of one unit; they share one K head.

    With Hv % Hk == 0 that is a K head and all its V heads, as far as R * Dv columns of sums fit the registers.
    Otherwise (Hv < Hk, or neither divides the other) it is a run of query heads with one K and one V head.
    """
    if Hv % Hk == 0:
        sharing = Hq // Hv
        R = largest_divisor(Hv // Hk, max(1, min(512 // Dv, 64 // sharing)))
        if R * sharing <= 64:
            return R * sharing, R
    return largest_divisor(gcd(Hq // Hk, Hq // Hv), 64), 1


@cache
def plan(
    Hq: int, Hk: int, Hv: int, Dk: int, Dv: int, page: int, q: torch.dtype, k: torch.dtype, v: torch.dtype, B: int,
    *, pack: int,
) -> Plan:  # fmt: skip
    ROWS, R = heads_per_unit(Hq, Hk, Hv, Dv)
    weight = Dk * element_weight(q, k, scaled=False) + R * Dv * element_weight(q, v, scaled=True)
    block = next(tokens for limit, tokens in TILES if weight <= limit)
    items = Hq // ROWS
    constants = {
        "HQ": Hq, "HK": Hk, "HV": Hv, "DK": Dk, "DV": Dv, "PAGE": page, "ROWS": ROWS, "R": R,
        "QT": max(1, 16 // ROWS),
        "M": max(16, triton.next_power_of_2(ROWS)),
        "DK_PAD": max(16, triton.next_power_of_2(Dk)),
        "WIDE": max(16, triton.next_power_of_2(R * Dv)),
        "BLOCK_N": block,
        "MIN_SPLIT": 4 * block,
        "MAX_SPLITS": 1 << (min(max(TARGET_UNITS // items, 8), 128).bit_length() - 1),
        "PACK": pack,
        "BLOCK_B": block_of_sequences(B),
        "QK_TYPE": dot_type(q, k, scaled=False),
        "PV_TYPE": dot_type(q, v, scaled=True),
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=3, max_registers=255)


@triton.jit
def _splits(n, length, window, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Where the tokens that any new row sees begin, tokens per split, number of splits."""
    low = tl.maximum(length - n - window + 1, 0) // BLOCK_N * BLOCK_N
    span = length - low
    split = (span + MAX_SPLITS - 1) // MAX_SPLITS
    split = tl.maximum((split + BLOCK_N - 1) // BLOCK_N * BLOCK_N, MIN_SPLIT)
    return low, split, (span + split - 1) // split


@triton.jit
def split_kernel(
    q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, k_scales, v_scales, partial, partial_lse,
    scale, window, longest, T, B, P, max_pages,
    q_token, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, table_row,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, QT: tl.constexpr, M: tl.constexpr, DK_PAD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_B: tl.constexpr, QK_TYPE: tl.constexpr, PV_TYPE: tl.constexpr,
):  # fmt: skip
    ITEMS: tl.constexpr = HQ // ROWS
    UNIFORM: tl.constexpr = PAGE % BLOCK_N == 0
    offs_b = tl.arange(0, BLOCK_B)
    _firsts, counts, lengths = sequence_bounds(cu_seqlens_q, seq_lens, offs_b, B, T, max_pages * PAGE)
    _lows, _stretches, splits = _splits(counts, lengths, window, BLOCK_N, MIN_SPLIT, MAX_SPLITS)
    blocks = tl.where(counts <= longest, (counts + QT - 1) // QT, 0)
    ends = tl.cumsum(blocks * splits * ITEMS, 0)

    row = tl.arange(0, M)
    head_in_item = row % ROWS
    column = tl.arange(0, WIDE)
    owned = ((head_in_item * R) // ROWS)[:, None] == (column // DV)[None, :]  # row i keeps its own V head's columns
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, DK_PAD)

    for unit in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        b = tl.sum((ends <= unit).to(tl.int32), 0)
        rest = unit - tl.max(tl.where(ends <= unit, ends, 0), 0)
        first, n, length = sequence_bounds(cu_seqlens_q, seq_lens, b, B, T, max_pages * PAGE)
        low, stretch, _number = _splits(n, length, window, BLOCK_N, MIN_SPLIT, MAX_SPLITS)
        q_blocks = (n + QT - 1) // QT
        token = rest % q_blocks * QT + row // ROWS
        item = rest // q_blocks % ITEMS
        part = rest // (q_blocks * ITEMS)
        head = item * ROWS + head_in_item
        live = (token < n) & (row < ROWS * QT)
        position = length - n + token

        q_rows = (first + token).to(tl.int64) * q_token + head * q_head
        query = tl.load(q + q_rows[:, None] + offs_k, mask=live[:, None] & (offs_k < DK), other=0.0).to(QK_TYPE)
        table = page_table + b.to(tl.int64) * table_row
        k_item = k_cache + (item * ROWS * HK // HQ).to(tl.int64) * k_head
        v_first = item * ROWS * HV // HQ
        v_item = v_cache + (v_first + column // DV).to(tl.int64) * v_head + column % DV

        begin = low + part * stretch
        end = tl.minimum(begin + stretch, length)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        sums = tl.zeros([M, WIDE], tl.float32)
        page = page_of(table, begin, offs_n, max_pages, P, PAGE, UNIFORM)
        for start in range(begin, end, BLOCK_N):
            # The next tile's page is fetched one tile ahead, so that the pipeline never waits for an address.
            next_page = page_of(table, start + BLOCK_N, offs_n, max_pages, P, PAGE, UNIFORM)
            j = start + offs_n
            slot = slot_of(start, offs_n, PAGE, UNIFORM)
            there = j < tl.where(page >= 0, end, 0)
            k_rows = page.to(tl.int64) * k_page + slot * k_slot
            k = tl.load(k_item + k_rows[:, None] + offs_k, mask=there[:, None] & (offs_k < DK), other=0.0)
            v_rows = page.to(tl.int64) * v_page + slot * v_slot
            v = tl.load(v_item + v_rows[:, None], mask=there[:, None] & (column < R * DV), other=0.0)

            factor = tl.where(page >= 0, scale, float("nan")) + tl.zeros([BLOCK_N], tl.float32)
            if k_scales is not None:
                k_row = (page.to(tl.int64) * HK + item * ROWS * HK // HQ) * PAGE + slot
                factor *= tl.load(k_scales + k_row, mask=there, other=0.0)
            s = tl.dot(query, tl.trans(k.to(QK_TYPE)), input_precision="tf32x3") * factor[None, :]
            behind = position[:, None] - j[None, :]
            seen = (behind >= 0) & (behind < window) & (j < end)[None, :] & live[:, None]
            s = tl.where(seen, s, float("-inf"))

            new_top = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(p, 1)
            if v_scales is not None:
                v_row = (page.to(tl.int64) * HV + v_first) * PAGE + slot
                owner = (head_in_item * R) // ROWS * PAGE
                p *= tl.load(v_scales + v_row[None, :] + owner[:, None], mask=there[None, :], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(p.to(PV_TYPE), v.to(PV_TYPE), input_precision="tf32x3")
            top = new_top
            page = next_page

        share = tl.where(total == 0.0, 1.0, total)
        packed = (b * PACK if PACK else first) + token
        target = (packed.to(tl.int64) * HQ + head) * MAX_SPLITS + part
        tl.store(partial_lse + target, top + tl.log2(share), mask=live)
        tl.store(
            partial + target[:, None] * DV + column % DV,
            sums / share[:, None],
            mask=owned & live[:, None] & (column < R * DV),
        )


@triton.jit
def merge_kernel(
    partial, partial_lse, out, lse, seq_lens, cu_seqlens_q, window, longest, T, B, max_pages,
    HQ: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, PACK: tl.constexpr, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per packed row and query head: weigh its splits by their share of the softmax, in order."""
    packed = tl.program_id(0)
    head = tl.program_id(1)
    if PACK:  # rows [B, PACK]: the short sequences of a mixed batch
        b = packed // PACK
        first, n, length = sequence_bounds(cu_seqlens_q, seq_lens, b, B, T, max_pages * PAGE)
        t = first + packed % PACK
        wanted = (packed % PACK < n) & (n <= longest)
    else:  # rows [T]; one that belongs to no sequence sees nothing
        t = packed
        _b, _first, n, length = sequence_of(t, cu_seqlens_q, seq_lens, B, T, max_pages * PAGE, BLOCK_B)
        wanted = t < T
    _low, _stretch, splits = _splits(n, length, window, BLOCK_N, MIN_SPLIT, MAX_SPLITS)
    if wanted:
        base = (packed.to(tl.int64) * HQ + head) * MAX_SPLITS
        offs_s = tl.arange(0, MAX_SPLITS)
        lses = tl.load(partial_lse + base + offs_s, mask=offs_s < splits, other=float("-inf"))
        top = tl.max(lses, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(lses - top), 0)
        offs_d = tl.arange(0, DV_PAD)
        sums = tl.zeros([DV_PAD], tl.float32)
        for start in range(0, splits, CHUNK):
            s = start + tl.arange(0, CHUNK)
            share = tl.exp2(tl.load(partial_lse + base + s, mask=s < splits, other=float("-inf")) - top)
            rows = partial + (base + s)[:, None] * DV + offs_d
            part = tl.load(rows, mask=(s < splits)[:, None] & (offs_d < DV), other=0.0)
            sums += tl.sum(part * share[:, None], 0)
        row = t.to(tl.int64) * HQ + head
        result = sums / tl.where(total == 0.0, 1.0, total)
        tl.store(out + row * DV + offs_d, result.to(out.dtype.element_ty), mask=offs_d < DV)
        LN2: tl.constexpr = 0.6931471805599453
        tl.store(lse + row, (top + tl.log2(total)) * LN2)


def merge_plan(split: Plan) -> Plan:
    names = ("HQ", "DV", "PAGE", "BLOCK_N", "MIN_SPLIT", "MAX_SPLITS", "PACK", "BLOCK_B")
    width = triton.next_power_of_2(split.constants["DV"])
    chunk = max(2, min(split.constants["MAX_SPLITS"], 4096 // width))
    constants = {name: split.constants[name] for name in names} | {"DV_PAD": width, "CHUNK": chunk}
    return Plan(constants=constants, num_warps=4, num_stages=2)


def programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: enough to take turns
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    k_scales: Tensor | None, v_scales: Tensor | None, scale: float, window: int, out: Tensor, lse: Tensor,
    *, longest: int | None, tuned: Plan | None = None,
) -> None:  # fmt: skip
    """Fill `out` and `lse` for sequences of at most `longest` new tokens; None: for all rows, also those of none."""
    T, Hq, Dk = q.shape
    B = seq_lens.shape[0]
    Hk, page = k_cache.shape[1:3]
    Hv, Dv = v_cache.shape[1], v_cache.shape[3]
    split = tuned or plan(Hq, Hk, Hv, Dk, Dv, page, q.dtype, k_cache.dtype, v_cache.dtype, B, pack=longest or 0)
    merge = merge_plan(split)
    rows = B * longest if longest else T
    partial = torch.empty(rows, Hq, split.constants["MAX_SPLITS"], Dv, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=q.device)
    split_kernel[programs(q.device),](
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, k_scales, v_scales, partial, partial_lse,
        scale * LOG2E, window, longest or T, T, B, k_cache.shape[0], page_table.shape[1],
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
        **split.constants, num_warps=split.num_warps, num_stages=split.num_stages,
        maxnreg=split.max_registers,
    )  # fmt: skip
    merge_kernel[rows, Hq](
        partial, partial_lse, out, lse, seq_lens, cu_seqlens_q, window, longest or T, T, B, page_table.shape[1],
        **merge.constants, num_warps=merge.num_warps, num_stages=merge.num_stages,
    )  # fmt: skip
