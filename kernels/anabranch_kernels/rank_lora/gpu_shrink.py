# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products of tokens with the rows of [router; A] on the GPU, as one matrix product that reads x once.

Layout   a program has a tile of tokens of one adapter, BLOCK_R joint rows and a part of the columns. With ROUTE it has
         all rows and all columns: ranks are chosen and gates applied in registers, and only `factors` (gate times
         product, for the expansion) and what backward needs leave it. Without, products go to `partial`, part by part,
         and whoever reads them adds the parts in order.
Bound    memory: x once, and the weights of an adapter once for each of its tiles, from the second cache.
Numerics float32 sums; float32 inputs are multiplied as such ("ieee"), for a score decides more than its last bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .gpu_route import grouped_tile, joint_rows, keep, place_of, route, sorted_tile

FEW = 128  # tokens up to which the columns are split and the tokens grouped without a sort
FUSED = 256  # joint rows up to which a tile's scores stay in registers


@cache
def plan(
    T: int,
    D: int,
    adapters: int,
    GW: int,
    RW: int,
    chosen: int,
    active: int,
    *,
    few: bool,
    routed: bool,
    kept: bool,
    aligned: bool,
) -> Plan:
    """Launch for T tokens, a power of two; `routed` chooses ranks at once, `kept` also writes what backward needs."""
    whole = max(16, triton.next_power_of_2(GW + RW))
    tokens = 16 if few else max(16, min(32 if T < 4096 else 64, 4096 // whole))  # no spills
    if few:
        splits = 16 if T <= 4 else 8 if T <= 16 else 4
        part = triton.cdiv(triton.cdiv(D, splits), 128) * 128
    else:
        part = triton.cdiv(D, 64) * 64
    constants = {
        "GW": GW, "RW": RW, "CHOSEN": chosen, "ACTIVE": active, "BLOCK_T": tokens,
        "BLOCK_R": whole if routed else 16 if few else min(64, whole),
        "BLOCK_K": 128 if few else 64,
        "PART": part,
        "SORTED": not few,
        "SEGMENTS": max(16, triton.next_power_of_2(T if few else adapters + 2)),
        "ROUTE": routed, "KEEP": kept, "ALIGNED": aligned,
    }  # fmt: skip
    return Plan(constants=constants, num_warps=min(8, max(4, tokens * whole // 512)) if routed else 4, num_stages=3)


@triton.jit
def shrink_kernel(
    x, router, a, bias, places, adapter_of, order, starts, partial, factors, picked, gates, h, counts,
    T, width, adapters, x_row, router_row, a_row,
    GW: tl.constexpr, RW: tl.constexpr, CHOSEN: tl.constexpr, ACTIVE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, SORTED: tl.constexpr, SEGMENTS: tl.constexpr,
    ROUTE: tl.constexpr, KEEP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if SORTED:
        adapter, token, live = sorted_tile(tl.program_id(0), order, starts, T, adapters, BLOCK_T, SEGMENTS)
    else:
        adapter, token, live = grouped_tile(tl.program_id(0), adapter_of, T, adapters, BLOCK_T, SEGMENTS)
    if adapter >= 0:
        first_rank, ranks, first_row, rows, chosen, gate = place_of(places, adapter)
        j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        at, there = joint_rows(j, router, a, first_rank, ranks, first_row, rows, router_row, a_row, GW, ALIGNED)
        x_at = x + token * x_row
        begin = tl.program_id(2) * PART
        end = tl.minimum(begin + PART, width)
        sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for start in range(begin, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            some = tl.load(x_at[:, None] + k, mask=live[:, None] & (k < end)[None, :], other=0.0)
            weight = tl.load(at[:, None] + k, mask=there[:, None] & (k < end)[None, :], other=0.0)
            sums = tl.dot(some, tl.trans(weight), sums, input_precision="ieee")
        if ROUTE:
            weights, before = route(sums, bias, ranks, first_row, rows, chosen, gate, GW, BLOCK_T, BLOCK_R)
            if KEEP:
                keep(
                    sums, weights, before, token, live, picked, gates, h, counts, ranks, first_row, rows,
                    GW, BLOCK_R, CHOSEN, ACTIVE,
                )  # fmt: skip
            factor = tl.maximum(weights, 0.0) * sums
            to = factors + token[:, None] * RW + (j - GW)[None, :]
            tl.store(to, factor.to(factors.dtype.element_ty), mask=live[:, None] & ((j >= GW) & there)[None, :])
        else:
            to = partial + (tl.program_id(2).to(tl.int64) * T + token)[:, None] * (GW + RW) + j[None, :]
            tl.store(to, sums, mask=live[:, None] & there[None, :])


def shrink(
    chosen: Plan, x: Tensor, router: Tensor, a: Tensor, bias: Tensor, places: Tensor, adapter_of: Tensor,
    sorted_tokens: tuple[Tensor, Tensor] | None, partial: Tensor | None, factors: Tensor | None,
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Launch: to `partial` [parts, T, W], or routed to `factors` [T, RW] and `kept` (picked, gates, h, counts)."""
    T, D = x.shape
    c = chosen.constants
    order, starts = sorted_tokens or (None, None)
    picked, gates, h, counts = kept or (None,) * 4
    grid = (
        tiles(T, len(places), c["BLOCK_T"]) if c["SORTED"] else T,
        triton.cdiv(c["GW"] + c["RW"], c["BLOCK_R"]),
        triton.cdiv(D, c["PART"]),
    )
    shrink_kernel[grid](
        x, router, a, bias, places, adapter_of, order, starts, partial, factors, picked, gates, h, counts,
        T, D, len(places), x.stride(0), router.stride(0), a.stride(0),
        **c, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip


def tiles(T: int, adapters: int, block: int) -> int:
    """Most tiles that T tokens of that many adapters fall into, those without one and those of a wrong one too."""
    return T // block + adapters + 2


def sort_tokens(adapter_of: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """Tokens by adapter, in their order within each, and where each adapter's begin (gpu_route.sorted_tile)."""
    inside = adapter_of.clamp(-1, adapters)
    by_adapter, order = inside.sort(stable=True)
    names = torch.arange(-1, adapters + 2, dtype=torch.int32, device=adapter_of.device)
    return order, torch.searchsorted(by_adapter, names, out_int32=True)
