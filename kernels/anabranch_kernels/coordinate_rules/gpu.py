# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005 (Triton knows no starred tuples)
"""Coordinate-wise rules on the GPU: each thread sorts the N values of its coordinates in its registers.

Layout   one program per BLOCK columns of a problem; N loads of a row's columns each, then a sorting network that is
         part of the program: only the exchanges that the rule needs, no address depends on a value.
Bound    memory: B*N*D elements from HBM once; up to 64 rows the exchanges are fewer than the bytes allow.
Numerics as the CPU, bit for bit: the same exchanges, comparisons in float32, sums of sorted values in float64.
Not here more than 64 rows, which are more than a thread's registers, and float64: the launcher takes the reference, on
         purpose. A NaN is found in the same pass and refused when it is done, so the launcher waits for it.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan, on_its_device
from . import reference
from .reference import Rule

MOST_ROWS = 64
MEDIAN, TRIMMED_MEAN, MEAN_AROUND_MEDIAN, SIGN_MAJORITY = (
    tl.constexpr(int(rule)) for rule in (Rule.MEDIAN, Rule.TRIMMED_MEAN, Rule.MEAN_AROUND_MEDIAN, Rule.SIGN_MAJORITY)
)


@cache
def plan(rule: int, f: int, N: int, dtype: torch.dtype) -> Plan:
    wide = 2 if dtype.itemsize == 2 and N <= 32 else 1  # columns of a thread: loads of 4 bytes, registers for all
    return Plan(constants={"RULE": rule, "F": f, "N": N, "BLOCK": 128 * wide}, num_warps=4, num_stages=1)


@triton.constexpr_function
def network(rule, f, N):
    """Batcher's merge exchange (csrc/sorting_network.h), without what changes nothing at the places the rule needs."""
    top = 1 << (N - 1).bit_length()
    exchanges, p = [], top // 2
    while p:
        q, r, d = top // 2, 0, p
        while True:
            exchanges += [(i, i + d) for i in range(N - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    begin, end = {0: ((N - 1) // 2, N // 2 + 1), 1: (f, N - f), 4: (0, 0)}.get(rule, (0, N))
    wanted, kept = set(range(begin, end)), []
    for low, high in reversed(exchanges):
        if low in wanted or high in wanted:
            wanted |= {low, high}
            kept.append((low, high))
    return tuple(reversed(kept))


@triton.jit
def _exchange(values, LOW: tl.constexpr, HIGH: tl.constexpr):
    low, high = tl.minimum(values[LOW], values[HIGH]), tl.maximum(values[LOW], values[HIGH])
    return values[:LOW] + (low,) + values[LOW + 1 : HIGH] + (high,) + values[HIGH + 1 :]


@triton.jit
def _median(values):
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    middle = (low + high) * 0.5
    return tl.where(tl.abs(middle) < float("inf"), middle, low * 0.5 + high * 0.5)


@triton.jit
def _mean(values):
    total = values[0].to(tl.float64)
    for i in tl.static_range(1, len(values)):
        total += values[i].to(tl.float64)
    return (total / len(values)).to(tl.float32)


@triton.jit
def _mean_around(centre, values, F: tl.constexpr):
    M: tl.constexpr = len(values) - F
    nearest = ()
    for r in tl.static_range(M):  # of values M apart one is taken, see csrc/coordinate_kernel.h
        taken = values[r]
        for i in tl.static_range(r, F, M):
            taken = tl.where(centre - values[i] > values[i + M] - centre, values[i + M], taken)
        nearest = nearest + (taken,)
    return tl.where(tl.abs(centre) < float("inf"), _mean(nearest), centre)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _majority(values):
    total = _sign(values[0])
    for i in tl.static_range(1, len(values)):
        total += _sign(values[i])
    return _sign(total)


@triton.jit
def sorting_kernel(
    points, out, found_nan, points_batch, points_row, D,
    RULE: tl.constexpr, F: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = points + b * points_batch
    wrong = tl.zeros([BLOCK], tl.int32)
    values = ()
    for _ in tl.static_range(N):
        x = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
        wrong |= (x != x).to(tl.int32)
        values = values + (x + 0.0,)  # -0 becomes 0
        row += points_row
    EXCHANGES: tl.constexpr = network(RULE, F, N)
    for e in tl.static_range(len(EXCHANGES)):
        values = _exchange(values, EXCHANGES[e][0], EXCHANGES[e][1])
    if RULE == SIGN_MAJORITY:
        result = _majority(values)
    elif RULE == MEDIAN:
        result = _median(values)
    elif RULE == TRIMMED_MEAN:
        result = _mean(values[F : N - F])
    elif RULE == MEAN_AROUND_MEDIAN:
        result = _mean_around(_median(values), values, F)
    else:
        result = _mean_around(_mean(values[F : N - F]), values, F)
    tl.store(out + b * D + d, result.to(out.dtype.element_ty), mask=d < D)
    tl.store(found_nan, 1, mask=tl.max(wrong) > 0)


@on_its_device
def coordinate_rule(points: Tensor, rule: int, f: int) -> Tensor:
    B, N, D = points.shape
    if N > MOST_ROWS or points.dtype == torch.float64:
        return reference.coordinate_rule(points, rule, f)
    points = points if points.stride(2) == 1 else points.contiguous()
    out = points.new_empty(B, D)
    if out.numel() == 0:
        return out
    found_nan = torch.zeros(1, dtype=torch.int32, device=points.device)
    chosen = plan(rule, f, N, points.dtype)
    sorting_kernel[B * triton.cdiv(D, chosen.constants["BLOCK"]),](
        points, out, found_nan, *points.stride()[:2], D,
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    if found_nan.item():
        reference.refuse_nan(points)
    return out
