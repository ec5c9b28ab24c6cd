# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sums of rows of B (or A) on the GPU: for few tokens over the ranks that each picked, for many as a matrix product.

Layout   expand_kernel has one token and BLOCK_N columns; it adds up the token's products, chooses its ranks (each
         program of a token does, for that is cheaper than one more launch) and reads the rows of B that were picked.
         sums_kernel has a tile of tokens of one adapter and BLOCK_N columns, and multiplies with all ranks: factors of
         those not picked are zero.
Bound    memory: y once, and B once for each tile or the picked rows of it for each token, from the second cache.
Numerics float32 sums. expand_kernel keeps factors in float32, sums_kernel takes them as they were stored.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .gpu_route import joint_rows, keep, place_of, route, sorted_tile
from .gpu_shrink import tiles

MOST = 2048  # joint rows that expand_kernel holds


@cache
def expand_plan(parts: int, GW: int, RW: int, chosen: int, active: int, *, add: bool) -> Plan:
    W = max(16, triton.next_power_of_2(GW + RW))
    constants = {
        "GW": GW, "RW": RW, "W": W, "CHOSEN": chosen, "ACTIVE": active, "PARTS": parts,
        "BLOCK_N": min(128, max(16, 16384 // W)), "ADD": add,
    }  # fmt: skip
    return Plan(constants=constants, num_warps=8, num_stages=1)


@triton.jit
def expand_kernel(
    partial, bias, b, places, scales, adapter_of, y, picked, gates, h, counts, T, width, adapters, b_row, y_row,
    GW: tl.constexpr, RW: tl.constexpr, W: tl.constexpr, CHOSEN: tl.constexpr, ACTIVE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter = tl.load(adapter_of + t)
    to = y + t * y_row + column
    if (adapter >= 0) & (adapter < adapters):
        first_rank, ranks, first_row, rows, chosen, gate = place_of(places, adapter)
        j = tl.arange(0, W)
        there = tl.where(j < GW, rows, GW + ranks) > j
        flat = tl.zeros([W], tl.float32)
        for part in range(PARTS):
            flat += tl.load(partial + (part * T.to(tl.int64) + t) * (GW + RW) + j, mask=there, other=0.0)
        sums = flat[None, :]
        weights, before = route(sums, bias, ranks, first_row, rows, chosen, gate, GW, 1, W)
        if not ADD and tl.program_id(1) == 0:
            token = t + tl.zeros([1], tl.int64)
            keep(
                sums, weights, before, token, token >= 0, picked, gates, h, counts, ranks, first_row, rows,
                GW, W, CHOSEN, ACTIVE,
            )  # fmt: skip
        weight = tl.sum(weights, 0)
        used = (weight >= 0.0) & (j >= GW)
        at = b + (first_rank + tl.maximum(j - GW, 0)).to(tl.int64) * b_row
        some = tl.load(at[:, None] + column, mask=used[:, None] & (column < width)[None, :], other=0.0)
        factor = tl.where(used, weight * flat, 0.0)
        result = tl.sum(factor[:, None] * some.to(tl.float32), 0) * tl.load(scales + adapter)
        if ADD:
            result += tl.load(to, mask=column < width, other=0.0).to(tl.float32)
        tl.store(to, result.to(y.dtype.element_ty), mask=column < width)
    elif not ADD:
        tl.store(to, tl.zeros([BLOCK_N], y.dtype.element_ty), mask=column < width)


def expand(
    partial: Tensor, bias: Tensor, b: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor, y: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None, GW: int, RW: int, chosen: int, active: int,
) -> None:  # fmt: skip
    """y = what partial [parts, T, GW + RW] makes of b; or added to y, when nothing is kept."""
    picked, gates, h, counts = kept or (None,) * 4
    plan = expand_plan(len(partial), GW, RW, chosen, active, add=kept is None)
    expand_kernel[len(y), triton.cdiv(y.shape[1], plan.constants["BLOCK_N"])](
        partial, bias, b, places, scales, adapter_of, y, picked, gates, h, counts, len(y), y.shape[1], len(places),
        b.stride(0), y.stride(0), **plan.constants, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


@cache
def sums_plan(T: int, adapters: int, GW: int, RW: int, dtype: torch.dtype, *, add: bool, aligned: bool) -> Plan:
    narrow = dtype == torch.float32
    constants = {
        "GW": GW, "RW": RW, "BLOCK_T": 32 if T < 4096 or narrow else 64, "BLOCK_R": 32 if narrow else 64,
        "BLOCK_N": 64 if narrow else 128, "SEGMENTS": max(16, triton.next_power_of_2(adapters + 2)), "ADD": add,
        "ALIGNED": aligned,
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=2)


@triton.jit
def sums_kernel(
    factors, router, a, places, scales, order, starts, y, T, width, adapters, router_row, a_row, y_row,
    GW: tl.constexpr, RW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    adapter, token, live = sorted_tile(tl.program_id(0), order, starts, T, adapters, BLOCK_T, SEGMENTS)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    to = y + token[:, None] * y_row + column
    inside = live[:, None] & (column < width)[None, :]
    if adapter >= 0:
        sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        first_rank, ranks, first_row, rows, _chosen, _gate = place_of(places, adapter)
        for start in range(0, GW + RW, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            at, there = joint_rows(j, router, a, first_rank, ranks, first_row, rows, router_row, a_row, GW, ALIGNED)
            factor_at = factors + token[:, None] * (GW + RW) + j[None, :]
            factor = tl.load(factor_at, mask=live[:, None] & there[None, :], other=0.0)
            some = tl.load(at[:, None] + column, mask=there[:, None] & (column < width)[None, :], other=0.0)
            sums = tl.dot(factor, some, sums, input_precision="ieee")
        sums *= tl.load(scales + adapter)
        if ADD:
            sums += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, sums.to(y.dtype.element_ty), mask=inside)
    elif not ADD:
        tl.store(to, tl.zeros([BLOCK_T, BLOCK_N], y.dtype.element_ty), mask=inside)


def sums(
    factors: Tensor, router: Tensor, a: Tensor, places: Tensor, scales: Tensor, sorted_tokens: tuple[Tensor, Tensor],
    y: Tensor, GW: int, RW: int, *, add: bool, aligned: bool,
) -> None:  # fmt: skip
    """y [T, width] = scale * factors [T, GW + RW] times the rows of [router; a]; or added to y."""
    plan = sums_plan(len(y), len(places), GW, RW, y.dtype, add=add, aligned=aligned)
    c = plan.constants
    grid = tiles(len(y), len(places), c["BLOCK_T"]), triton.cdiv(y.shape[1], c["BLOCK_N"])
    sums_kernel[grid](
        factors, router, a, places, scales, *sorted_tokens, y, len(y), y.shape[1], len(places),
        router.stride(0), a.stride(0), y.stride(0), **c, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
