# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Gradients of adapters with routed ranks on the GPU, by tiles, without a temporary for each pair of token and rank.

    dv = dY B^T, logits = x W^T      shrink_kernel, into [T, ranks] and [T, rows] of float32
    dlogits, gate dv, gate h         gates_kernel, a token to a program; dense, zero where nothing was picked
    dx = [dlogits, gate dv] [W; A]   sums_kernel
    [dW; dA], dB                     weights_kernel

Layout   a program of weights_kernel has BLOCK_R rows of the router, A or B and BLOCK_N columns, and walks over the
         tokens of each adapter that has some of these rows, adapter by adapter. So no two programs write one number, no
         sum is atomic, and two runs agree bit for bit.
Bound    memory: x and dY three times and twice, dx once; the temporaries are a few percent of x.
Numerics float32 sums; the adapter's scale meets them at the end.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .gpu_expand import sums
from .gpu_route import SIGMOID, SMALLEST, SOFTMAX, UNBIASED, block_of, place_of
from .gpu_shrink import plan as shrink_plan
from .gpu_shrink import shrink, sort_tokens


@cache
def gates_plan(GW: int, RW: int, chosen: int, active: int) -> Plan:
    W = max(16, triton.next_power_of_2(GW + RW))
    constants = {"GW": GW, "RW": RW, "W": W, "CHOSEN": chosen, "ACTIVE": active}
    return Plan(constants=constants, num_warps=1 if W <= 256 else 4, num_stages=1)


@triton.jit
def gates_kernel(
    dv, logits, picked, gates, h, bias, places, adapter_of, backward, forward, adapters,
    GW: tl.constexpr, RW: tl.constexpr, W: tl.constexpr, CHOSEN: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """One token: `backward` [T, GW + RW] = dlogits and gate * dv, `forward` [T, RW] = gate * h."""
    t = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapter_of + t)
    if (adapter >= 0) & (adapter < adapters):
        _first_rank, ranks, first_row, rows, chosen, gate = place_of(places, adapter)
        j = tl.arange(0, W)
        block, key = block_of(j, ranks, rows, GW)
        is_row = j < rows
        rank = tl.maximum(j - GW, 0)
        is_rank = (j >= GW) & (rank < ranks)
        weight = tl.where(is_rank, tl.where(rows == 0, 1.0, 0.0), 0.0)
        slot = tl.where(rows == 0, rank, -1)  # of h; below zero where nothing was picked
        for c in range(chosen):
            here = key == tl.load(picked + t * CHOSEN + c)
            weight = tl.where(here, tl.load(gates + t * CHOSEN + c), weight)
            slot = tl.where(here, c * block + rank % block, slot)
        hidden = tl.load(h + t * ACTIVE + slot, mask=is_rank & (slot >= 0), other=0.0)
        slope = tl.load(dv + t * RW + rank, mask=is_rank, other=0.0)
        gain = hidden * slope
        dgates = tl.zeros([W], tl.float32)
        for c in range(chosen):
            index = tl.load(picked + t * CHOSEN + c)
            here = key == index
            dgates = tl.where(here, tl.sum(tl.where(here & is_rank, gain, 0.0), 0), dgates)
        of_row = is_row & (slot >= 0)
        centred = dgates - tl.sum(tl.where(of_row, dgates * weight, 0.0), 0)
        p = 1.0 / (1.0 + tl.exp(-tl.load(logits + t * GW + j, mask=is_row, other=0.0)))
        biased = p + tl.load(bias + first_row + j, mask=is_row, other=0.0)
        kept = tl.where(of_row, tl.where(gate == UNBIASED, p, tl.maximum(biased, SMALLEST)), 0.0)
        total = tl.sum(kept, 0)
        moved = tl.where((gate == SIGMOID) & (biased <= SMALLEST), 0.0, p * (1.0 - p))
        moved = tl.where(gate == SOFTMAX, weight, moved / tl.where(total == 0.0, 1.0, total))
        down = tl.where(is_rank, weight * slope, tl.where(of_row, moved * centred, 0.0))
        width: tl.constexpr = GW + RW
        tl.store(backward + t * width + j, down.to(backward.dtype.element_ty), mask=j < width)
        tl.store(forward + t * RW + rank, (weight * hidden).to(forward.dtype.element_ty), mask=is_rank)


@cache
def weights_plan(GW: int, RW: int, dtype: torch.dtype) -> Plan:
    narrow = dtype == torch.float32
    constants = {"GW": GW, "RW": RW, "BLOCK_T": 32 if narrow else 64, "BLOCK_R": 64, "BLOCK_N": 64}
    return Plan(constants=constants, num_warps=4, num_stages=2 if narrow else 3)


@triton.jit
def weights_kernel(
    x, factors, places, scales, order, starts, drouter, da, router_rows, rank_rows, width, adapters, x_row,
    GW: tl.constexpr, RW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of the gradient of [router; A]: scale * factors^T x over the tokens of the adapters that own them."""
    router_chunks = (router_rows + BLOCK_R - 1) // BLOCK_R
    of_router = tl.program_id(0) < router_chunks
    begin_row = (tl.program_id(0) - tl.where(of_router, 0, router_chunks)) * BLOCK_R
    field = tl.where(of_router, 2, 0)
    shift = tl.where(of_router, 0, GW)
    row = begin_row + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for adapter in range(adapters):
        first = tl.load(places + adapter * 6 + field)
        count = tl.load(places + adapter * 6 + field + 1)
        if (first < begin_row + BLOCK_R) & (first + count > begin_row):
            j = row - first
            there = (j >= 0) & (j < count)
            end = tl.load(starts + adapter + 2)
            part = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            for start in range(tl.load(starts + adapter + 1), end, BLOCK_T):
                slot = start + tl.arange(0, BLOCK_T)
                token = tl.load(order + slot, mask=slot < end, other=0).to(tl.int64)
                factor_at = factors + token[:, None] * (GW + RW) + (shift + j)[None, :]
                factor = tl.load(factor_at, mask=(slot < end)[:, None] & there[None, :], other=0.0)
                x_at = x + token[:, None] * x_row + column[None, :]
                some = tl.load(x_at, mask=(slot < end)[:, None] & (column < width)[None, :], other=0.0)
                part = tl.dot(tl.trans(factor), some, part, input_precision="ieee")
            sums += part * tl.load(scales + adapter)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (column < width)[None, :]
    if of_router:
        tl.store(drouter + at, sums.to(drouter.dtype.element_ty), mask=inside & (row < router_rows)[:, None])
    else:
        tl.store(da + at, sums.to(da.dtype.element_ty), mask=inside & (row < rank_rows)[:, None])


def _weights(
    x: Tensor, factors: Tensor, places: Tensor, scales: Tensor, sorted_tokens: tuple[Tensor, Tensor],
    drouter: Tensor, da: Tensor, GW: int, RW: int,
) -> None:  # fmt: skip
    plan = weights_plan(GW, RW, x.dtype)
    c = plan.constants
    chunks = triton.cdiv(len(drouter), c["BLOCK_R"]) + triton.cdiv(len(da), c["BLOCK_R"])
    if chunks == 0:
        return
    weights_kernel[chunks, triton.cdiv(x.shape[1], c["BLOCK_N"])](
        x, factors, places, scales, *sorted_tokens, drouter, da, len(drouter), len(da), x.shape[1], len(places),
        x.stride(0), **c, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def gradients(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, picked: Tensor, gates: Tensor, h: Tensor, GW: int, RW: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, da, db, drouter; tensors with dense rows."""
    T, A, C, active = len(x), len(places), picked.shape[1], h.shape[1]
    rounded = 1 << (T - 1).bit_length()
    by_adapter = sort_tokens(adapter_of, A)

    def products(of: Tensor, router: Tensor, a: Tensor, GW: int, RW: int) -> Tensor:
        launch = shrink_plan(
            rounded, of.shape[1], A, GW, RW, C, active, few=False, routed=False, kept=False, aligned=aligned
        )
        out = torch.empty(1, T, GW + RW, dtype=torch.float32, device=x.device)
        if GW + RW:
            shrink(launch, of, router, a, bias, places, adapter_of, by_adapter, out, None, None)
        return out[0]

    dv, logits = products(grad, router, b, 0, RW), products(x, router, a, GW, 0)
    backward, forward = x.new_empty(T, GW + RW), x.new_empty(T, RW)
    plan = gates_plan(GW, RW, C, active)
    gates_kernel[T,](
        dv, logits, picked, gates, h, bias, places, adapter_of, backward, forward, A,
        **plan.constants, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    dx, da, db, drouter = (t.new_empty(t.shape) for t in (x, a, b, router))
    sums(backward, router, a, places, scales, by_adapter, dx, GW, RW, add=False, aligned=aligned)
    _weights(x, backward, places, scales, by_adapter, drouter, da, GW, RW)
    _weights(grad, forward, places, scales, by_adapter, drouter[:0], db, 0, RW)
    return dx, da, db, drouter
