# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products of centred rows and a sum of them on the GPU: two reads, whose order of addition the sizes alone decide.

Layout   Gram matrix: a program takes a stretch of the columns of one problem and two blocks of its rows, the second not
         above the first; its sums go to scratch, and a second kernel adds the stretches up in order. No sum is atomic:
         two runs agree bit for bit, on any GPU. Combination: a program takes BLOCK columns of all rows.
Bound    memory up to about 64 rows. Each number is turned into a sum of two of tf32, x = h + l, on the tensor cores:
         two products h (h + 2 l)' where a problem is one block, and is made symmetric in the end; three where it is
         more. The float32 units would need N (N + 1) / 2 multiply-adds for N numbers, which at N = 32 is all they have
         while these numbers arrive.
Numerics l l' is left out: at most 2^-22 of the product of two norms, 2^-25 as a mean, as rounding to float32 is. Sums
         are float32 within tiles of TILE columns, float64 beyond. Equal rows take equal steps: their distance
         is exactly zero. Where the squares of a row of a stretch leave float32's range, the stretch is read
         again, each row of a tile over a power of two; otherwise the launch that would do so finds nothing to do.
Not here float64 rows: they go to the reference, on purpose. The problem of N unknowns in between: gpu_solve.py.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan, on_its_device
from ..tensors import dense_rows
from . import reference

# Rows of a block -> columns of a tile, warps, stages. One warp that has all rows of a tile to itself needs no other's.
TILES = {16: (64, 1, 4), 32: (32, 1, 4), 64: (64, 4, 2)}
PROGRAMS = 4096  # of a launch, about: some for each multiprocessor, one after another
WIDTH = 4096  # columns of a stretch, at least: its sums are written and added up in the end
PARTIAL_SUMS = 1 << 23  # float64 sums kept at a time, at most: 64 MiB


@cache
def gram_plan(N: int, *, scaled: bool) -> Plan:
    ROWS = 16 if N <= 16 else 32 if N <= 32 else 64
    TILE, warps, stages = TILES[ROWS]
    if scaled:
        warps = max(4, 2 * warps)  # rarely at work, and short of registers
    constants = {"ROWS": ROWS, "TILE": TILE, "LONE": N <= ROWS, "SCALED": scaled}
    return Plan(constants=constants, num_warps=warps, num_stages=stages)


def sum_plan(N: int) -> Plan:
    ROWS = gram_plan(N, scaled=False).constants["ROWS"]
    return Plan(constants={"ROWS": ROWS, "ENTRIES": 16, "CHUNK": 64}, num_warps=4, num_stages=2)


def combine_plan(N: int) -> Plan:
    constants = {"N_PAD": max(2, triton.next_power_of_2(N)), "ROWS": 8, "BLOCK": 512}
    return Plan(constants=constants, num_warps=4, num_stages=2)


@triton.jit
def _finite(x):
    """x in float32, zero where it is not finite."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _differences(points, centre, row, column, points_row, N, count):
    """p_i - c [rows, columns] of some columns; zero in columns beyond, anything in rows beyond."""
    rows = points + row.to(tl.int64)[:, None] * points_row
    x = tl.load(rows + column, mask=(row < N)[:, None] & (column < count), other=0.0).to(tl.float32)
    if centre is not None:
        x -= _finite(tl.load(centre + column, mask=column < count, other=0.0))
    return x


@triton.jit
def _scale(x):
    """x with each row over a power of two near its largest number, and these powers in float64."""
    exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 27), 253)  # 2^100 and 2^-126: both ways in float32's range
    factor = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    return x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None], factor


@triton.jit
def _split(x):
    """Two numbers of tf32 (11 bits) whose sum is x, but for its last bit."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _rescue(points, centre, squares, row, points_row, N, count, TILE: tl.constexpr):
    """Whether some of these rows needs another scale: finite, not zero, squares out of float32's range."""
    square = tl.load(squares + row, mask=row < N, other=1.0)
    odd = ~((square > 1e-24) & (square < 1e30))  # above it, what products below 2^-126 lose is nothing
    if centre is not None:  # the centre's own row is zero, and need not be read for that
        own = (points + row.to(tl.int64) * points_row).to(tl.int64) == centre.to(tl.int64)
        odd = odd & ~(own & (square == 0.0))
    needed = tl.max(odd.to(tl.int32), 0) > 0
    if needed:
        largest = tl.zeros_like(square).to(tl.float32)
        for start in range(0, count, TILE):
            column = start + tl.arange(0, TILE)
            x = tl.abs(_differences(points, centre, tl.where(odd, row, N), column, points_row, N, count))
            largest = tl.maximum(largest, tl.max(tl.where(x >= 0.0, x, float("inf")), 1))
        needed = tl.max((odd & (largest > 0.0) & (largest < float("inf"))).to(tl.int32), 0) > 0
    return needed


@triton.jit
def gram_kernel(
    points, centre, partial, squares, N, D, width, parts, blocks, points_batch, points_row, centre_batch,
    ROWS: tl.constexpr, TILE: tl.constexpr, LONE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // blocks % blocks
    other_block = tl.program_id(0) % blocks
    stretch = tl.program_id(0) // (blocks * blocks)
    batch = (stretch // parts).to(tl.int64)
    begin = (stretch % parts).to(tl.int64) * width
    count = tl.minimum(width, D - begin).to(tl.int32)
    points += batch * points_batch + begin
    if centre is not None:
        centre += batch * centre_batch + begin
    partial += stretch.to(tl.int64) * N * N
    squares += stretch.to(tl.int64) * N
    row = block * ROWS + tl.arange(0, ROWS)
    other = other_block * ROWS + tl.arange(0, ROWS)
    wanted = block <= other_block
    if SCALED and wanted:
        wanted = _rescue(points, centre, squares, row, points_row, N, count, TILE)
        if not LONE:
            wanted = wanted | _rescue(points, centre, squares, other, points_row, N, count, TILE)
    if wanted:
        total = tl.zeros([ROWS, ROWS], tl.float64)
        for start in range(0, count, TILE):
            column = start + tl.arange(0, TILE)
            x = _differences(points, centre, row, column, points_row, N, count)
            if SCALED:
                x, x_factor = _scale(x)
            high, low = _split(x)
            if LONE:
                product = tl.dot(high, tl.trans(low), input_precision="tf32")
                product = tl.dot(high, tl.trans(high), product + product, input_precision="tf32")
                if SCALED:
                    y_factor = x_factor
            else:
                y = _differences(points, centre, other, column, points_row, N, count)
                if SCALED:
                    y, y_factor = _scale(y)
                y_high, y_low = _split(y)
                product = tl.dot(high, tl.trans(y_low), input_precision="tf32")
                product = tl.dot(low, tl.trans(y_high), product, input_precision="tf32")
                product = tl.dot(high, tl.trans(y_high), product, input_precision="tf32")
            if SCALED:
                total += product.to(tl.float64) * (x_factor[:, None] * y_factor[None, :])
            else:
                total += product.to(tl.float64)
        inside = (row < N)[:, None] & (other < N)
        tl.store(partial + row.to(tl.int64)[:, None] * N + other, total, mask=inside)
        if not SCALED and block == other_block:
            square = tl.sum(tl.where(row[:, None] == other[None, :], total, 0.0), 1)
            tl.store(squares + row, square, mask=row < N)


@triton.jit
def sum_kernel(
    partial, gram, N, parts, ROWS: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ENTRIES of a Gram matrix: sums over the stretches, symmetric."""
    tasks = tl.cdiv(N * N, ENTRIES)
    batch = (tl.program_id(0) // tasks).to(tl.int64)
    entry = tl.program_id(0) % tasks * ENTRIES + tl.arange(0, ENTRIES)
    i = entry // N
    j = entry % N
    here = tl.where(i // ROWS <= j // ROWS, i * N + j, j * N + i)
    there = tl.where(i // ROWS == j // ROWS, j * N + i, here)
    total = tl.zeros([ENTRIES], tl.float64)
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        sums = partial + (batch * parts + part)[:, None] * N * N
        inside = (part < parts)[:, None] & (i < N)
        total += tl.sum(tl.load(sums + here, mask=inside, other=0.0) + tl.load(sums + there, mask=inside, other=0.0), 0)
    tl.store(gram + batch * N * N + entry, 0.5 * total, mask=i < N)


@triton.jit
def combine_kernel(
    points, coefficients, centre, out, N, D, points_batch, points_row, centre_batch,
    N_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tasks = tl.cdiv(D, BLOCK)
    batch = (tl.program_id(0) // tasks).to(tl.int64)
    column = (tl.program_id(0) % tasks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    points += batch * points_batch
    coefficients += batch * N
    every = tl.arange(0, N_PAD)
    a = tl.load(coefficients + every, mask=every < N, other=0.0)
    alone = (tl.sum((a != 0.0).to(tl.int32), 0) == 1) & (tl.sum((a == 1.0).to(tl.int32), 0) == 1)
    target = out + batch * D + column
    if alone:
        row = tl.sum(tl.where(a == 1.0, every, 0), 0).to(tl.int64)
        tl.store(target, tl.load(points + row * points_row + column, mask=inside, other=0.0), mask=inside)
    else:
        middle = tl.zeros([BLOCK], tl.float32)
        if centre is not None:
            middle = _finite(tl.load(centre + batch * centre_batch + column, mask=inside, other=0.0))
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, N, ROWS):
            row = start + tl.arange(0, ROWS)
            factor = tl.load(coefficients + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
            takes = (factor != 0.0) & inside
            rows = points + row.to(tl.int64)[:, None] * points_row + column
            x = tl.load(rows, mask=takes, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(takes, factor * (x - middle), 0.0), 0)
        tl.store(target, (middle + total).to(out.dtype.element_ty), mask=inside)


def stretches(B: int, N: int, D: int) -> tuple[int, int]:
    """Columns of a stretch and how many of them there are: from the sizes alone, and so is the order of all sums."""
    blocks = triton.cdiv(N, gram_plan(N, scaled=False).constants["ROWS"])
    pairs = blocks * (blocks + 1) // 2
    most = max(1, min(PROGRAMS // (B * pairs), PARTIAL_SUMS // (B * N * N)))
    width = max(WIDTH, triton.cdiv(triton.cdiv(D, most), 1024) * 1024)
    return width, max(1, triton.cdiv(D, width))


@on_its_device
def centred_gram(points: Tensor, centre: Tensor | None, tuned: Plan | None = None) -> Tensor:
    if points.dtype == torch.float64 or points.numel() == 0:
        return reference.centred_gram(points, centre)
    points, centre = dense_rows(points), None if centre is None else dense_rows(centre)
    B, N, D = points.shape
    plan = tuned or gram_plan(N, scaled=False)
    blocks = triton.cdiv(N, plan.constants["ROWS"])
    width, parts = stretches(B, N, D)
    partial = points.new_empty(B, parts, N, N, dtype=torch.float64)
    squares = points.new_empty(B, parts, N, dtype=torch.float64)
    for chosen in (plan, gram_plan(N, scaled=True)):
        gram_kernel[B * parts * blocks * blocks,](
            points, centre, partial, squares, N, D, width, parts, blocks, *_strides(points, centre),
            **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    gram = points.new_empty(B, N, N, dtype=torch.float64)
    sums = sum_plan(N)
    sum_kernel[B * triton.cdiv(N * N, sums.constants["ENTRIES"]),](
        partial, gram, N, parts,
        **sums.constants, num_warps=sums.num_warps, num_stages=sums.num_stages,
    )  # fmt: skip
    return gram


@on_its_device
def combine(points: Tensor, coefficients: Tensor, centre: Tensor | None) -> Tensor:
    if points.dtype == torch.float64 or points.numel() == 0:
        return reference.combine(points, coefficients, centre)
    points, centre = dense_rows(points), None if centre is None else dense_rows(centre)
    B, N, D = points.shape
    out = points.new_empty(B, D)
    plan = combine_plan(N)
    combine_kernel[B * triton.cdiv(D, plan.constants["BLOCK"]),](
        points, coefficients.contiguous(), centre, out, N, D, *_strides(points, centre),
        **plan.constants, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return out


def _strides(points: Tensor, centre: Tensor | None) -> tuple[int, int, int]:
    return points.stride(0), points.stride(1), 0 if centre is None else centre.stride(0)
