# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sums over very many terms modulo p on a GPU: [M, U] x [U, C] with U long and C small, as projections of shares are.

Layout   a program takes ROWS rows, COLUMNS columns and a share of U, SPAN terms at a time; shares go to partial
         [S, M, C], which the caller adds up. Which terms meet where depends on the shape alone: results repeat.
Bound    memory: the matrix is read once for each COLUMNS columns, x comes from L2. The tensor cores do not pay here:
         digits of either side (gpu_multiply) are 4 D bytes per element, written and read once more, for a few products.
Numerics exact: products of 64 (for int64 128) bits, whose 32-bit halves are added up in 64 bits, up to 2^32 of each.
         Four products below 2^62 are added first; a 31-bit field needs half an addition per product.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .fields import Field
from .gpu_arithmetic import add, from_halves, times_2_to_32

PROGRAMS = 1024


@cache
def plan(field: Field) -> Plan:
    rows = 8 if field.bytes == 4 else 4
    constants = {"P": field.p, "D": field.bytes, "ROWS": rows, "COLUMNS": 4, "SPAN": 64}
    return Plan(constants=constants, num_warps=4, num_stages=1)


@triton.jit
def project_kernel(
    matrix, x, partial, M, U, C, share, matrix_row, x_row, x_column,
    P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    rows = matrix + m[:, None].to(tl.int64) * matrix_row
    columns = x + c[:, None] * x_column
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, U)
    low = tl.zeros([ROWS, COLUMNS, SPAN], tl.uint64)
    high = tl.zeros([ROWS, COLUMNS, SPAN], tl.uint64)
    low_2 = tl.zeros([ROWS, COLUMNS, SPAN], tl.uint64)  # halves of the upper 64 bits
    high_2 = tl.zeros([ROWS, COLUMNS, SPAN], tl.uint64)
    for start in range(first, end, 4 * SPAN):
        four = tl.zeros([ROWS, COLUMNS, SPAN], tl.uint64)
        for i in tl.static_range(4):
            u = start + i * SPAN + tl.arange(0, SPAN)
            left = tl.load(rows + u, mask=(m < M)[:, None] & (u < end), other=0)
            right = tl.load(columns + u.to(tl.int64) * x_row, mask=(c < C)[:, None] & (u < end), other=0)
            left, right = left[:, None, :].to(tl.uint64), right[None, :, :].to(tl.uint64)
            if D == 4:
                four += left * right
            else:
                product = left * right
                low += product & 4294967295
                high += product >> 32
                upper = tl.umulhi(left, right)
                low_2 += upper & 4294967295
                high_2 += upper >> 32
        if D == 4:
            low += four & 4294967295
            high += four >> 32
    total = from_halves(tl.sum(low, 2), tl.sum(high, 2), P)
    if D == 8:
        upper = from_halves(tl.sum(low_2, 2), tl.sum(high_2, 2), P)
        total = add(times_2_to_32(times_2_to_32(upper, P), P), total, P)
    target = (tl.program_id(0).to(tl.int64) * M + m[:, None]) * C + c
    tl.store(partial + target, total.to(partial.dtype.element_ty), mask=(m < M)[:, None] & (c < C))


def project(matrix: Tensor, x: Tensor, field: Field) -> Tensor:
    """Parts [S, M, C] whose sum modulo p is [M, U] x [U, C]."""
    (M, U), C = matrix.shape, x.shape[1]
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    chosen = plan(field)
    tiles, groups = (triton.cdiv(n, chosen.constants[name]) for n, name in ((M, "ROWS"), (C, "COLUMNS")))
    step = 4 * chosen.constants["SPAN"]
    share = step * triton.cdiv(U, step * max(1, PROGRAMS // (tiles * groups)))
    partial = x.new_empty(triton.cdiv(U, share), M, C)
    project_kernel[len(partial), tiles, groups](
        matrix, x, partial, M, U, C, share, matrix.stride(0), *x.stride(),
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return partial
