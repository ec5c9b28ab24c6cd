# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The problem of N unknowns on the GPU: one program per problem, from the Gram matrix to the certificate in one launch.

Layout   vectors of N in registers. Matrices stay in memory, close by in a cache, and are met ROWS rows at a time; the
         rows' part of a vector is lent to them through memory too.
Bound    latency: some ten steps, each N eliminations that wait for one another. Problems run side by side.
Numerics float64, step by step what solve.py does, whose names these are; sums are added in another order, and the
         systems are solved by Gauss-Jordan elimination, which meets the pivots of Cholesky's: it fails where that does.
Not here N above 128, where one multiprocessor is too little for a problem: the launcher takes solve.py, on purpose.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan, on_its_device
from . import solve as by_torch

LARGEST = 128
WARPS = {16: 1, 32: 4, 64: 8, 128: 8}
TINY = tl.constexpr(2.0**-1022)
ROOT_OF_TINY = tl.constexpr(2.0**-511)


@cache
def plan(N: int) -> Plan:
    N_PAD = max(16, triton.next_power_of_2(N))
    names = ("CONVERGED", "ANCHOR", "COLLINEAR", "HALVINGS", "POLISH", "ROUNDING", "SLACK", "COINCIDENT")
    constants = {"N_PAD": N_PAD, "ROWS": min(N_PAD, 32), **{name: getattr(by_torch, name) for name in names}}
    return Plan(constants=constants, num_warps=WARPS[N_PAD], num_stages=1, max_registers=255)


@triton.jit
def _rows(matrix, i, N, N_PAD: tl.constexpr):
    offs = tl.arange(0, N_PAD)
    return tl.load(matrix + i[:, None] * N + offs, mask=(i < N)[:, None] & (offs < N), other=0.0)


@triton.jit
def _diagonal(matrix, i, N):
    return tl.load(matrix + i * (N + 1), mask=i < N, other=0.0)


@triton.jit
def _pick(vector, index, N_PAD: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, N_PAD) == index, vector, 0.0), 0)


@triton.jit
def _lend(vector, room, N, N_PAD: tl.constexpr):
    """Put a vector where all threads can read any part of it."""
    offs = tl.arange(0, N_PAD)
    tl.debug_barrier()  # those who read what was there have done so
    tl.store(room + offs, vector, mask=offs < N)
    tl.debug_barrier()


@triton.jit
def _times(K, a, room, N, N_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Ka; sums run down the columns, since K is symmetric."""
    _lend(a, room, N, N_PAD)
    total = tl.zeros([N_PAD], tl.float64)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)
        total += tl.sum(_rows(K, i, N, N_PAD) * tl.load(room + i, mask=i < N, other=0.0)[:, None], 0)
    return total


@triton.jit
def _at(K, diagonal, w, a, room, N, N_PAD: tl.constexpr, ROWS: tl.constexpr, ROUNDING: tl.constexpr):
    """Ka, q, r, v, f, gain, noise of coefficients a."""
    Ka = _times(K, a, room, N, N_PAD, ROWS)
    q = tl.sum(a * Ka, 0)
    change = q - 2 * Ka
    r = tl.sqrt(tl.maximum(diagonal + change, ROOT_OF_TINY))
    gains = w * change / (r + tl.sqrt(tl.maximum(diagonal, 0.0)))
    return Ka, q, r, w / r, tl.sum(w * r, 0), tl.sum(gains, 0), ROUNDING * tl.sum(tl.abs(gains), 0)


@triton.jit
def _solve_positive(M, right, N, N_PAD: tl.constexpr, ROWS: tl.constexpr):
    """M^-1 right; NaN where a pivot is not positive. Columns are eliminated, since M is symmetric; M is used up."""
    offs = tl.arange(0, N_PAD)
    pivots = tl.full([N_PAD], 1.0, tl.float64)
    for j in range(N):
        row = tl.load(M + j * N + offs, mask=offs < N, other=0.0)
        pivot = _pick(row, j, N_PAD)
        pivots = tl.where(offs == j, pivot, pivots)
        factor = tl.where(offs == j, 0.0, row / pivot)
        right -= factor * _pick(right, j, N_PAD)
        for start in range(j // ROWS * ROWS, N, ROWS):
            i = start + tl.arange(0, ROWS)
            below = (i > j) & (i < N)
            left = tl.load(M + j * N + i, mask=below, other=0.0)  # column j too: what is left of M is symmetric
            some = M + i[:, None] * N + offs
            inside = below[:, None] & (offs < N)
            tl.store(some, tl.load(some, mask=inside, other=0.0) - left[:, None] * factor, mask=inside)
        tl.debug_barrier()
    positive = tl.min(tl.where(pivots > 0.0, 1, 0), 0) > 0
    return tl.where(positive, right / pivots, float("nan"))


@triton.jit
def _newton_step(K, M, a, Ka, q, r, v, room, N, N_PAD: tl.constexpr, ROWS: tl.constexpr):
    offs = tl.arange(0, N_PAD)
    root = tl.sqrt(v) / r
    s = tl.sum(v, 0)
    _lend(Ka, room, N, N_PAD)
    _lend(root, room + N, N, N_PAD)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)
        G = _rows(K, i, N, N_PAD) - tl.load(room + i, mask=i < N, other=0.0)[:, None] - Ka + q
        G *= tl.load(room + N + i, mask=i < N, other=0.0)[:, None] * root
        inside = (i < N)[:, None] & (offs < N)
        tl.store(M + i[:, None] * N + offs, tl.where(i[:, None] == offs, s, 0.0) - G, mask=inside)
    tl.debug_barrier()
    right = tl.where(root > 0.0, (s * a - v) / tl.where(root > 0.0, root, 1.0), 0.0)
    c = root * _solve_positive(M, right, N, N_PAD, ROWS)
    return tl.sum(c, 0) * a - c


@triton.jit
def _gap(K, w, a, r, v, f, room, N, N_PAD: tl.constexpr, ROWS: tl.constexpr):
    gamma = tl.sum(v, 0) * a - v
    Kg = _times(K, gamma, room, N, N_PAD, ROWS)
    g2 = tl.maximum(tl.sum(gamma * Kg, 0), 0.0)
    b = Kg - tl.sum(a * Kg, 0)
    heavy = w > 0.0
    lengths = 1 + 2 * v * b / tl.where(heavy, w, 1.0) + g2
    by_all = (f + tl.sum(w * b, 0)) / tl.sqrt(tl.max(tl.where(heavy, tl.maximum(lengths, 1.0), 1.0), 0))
    k = tl.argmin(tl.where(heavy, r, float("inf")), 0)
    own = _pick(w, k, N_PAD)
    dot = _pick(b, k, N_PAD)
    length = 1 + (2 * _pick(v, k, N_PAD) * dot + g2) / (own * own)
    by_one = (f + dot) / tl.sqrt(tl.maximum(length, 1.0))
    return tl.maximum(tl.minimum(2 * tl.sqrt(g2), 1 - tl.maximum(by_all, by_one) / f), 0.0)


@triton.jit
def _recentre(gram, K, w, weights, N, N_PAD: tl.constexpr, ROWS: tl.constexpr, COINCIDENT: tl.constexpr):
    """The best point, which lie there, the squares of each and the best added up; fills K."""
    offs = tl.arange(0, N_PAD)
    diagonal = _diagonal(gram, offs, N)
    sums = tl.zeros([N_PAD], tl.float64)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)
        squared = _diagonal(gram, i, N)[:, None] + diagonal - 2 * _rows(gram, i, N, N_PAD)
        w_i = tl.load(weights + i, mask=i < N, other=0.0)
        sums += tl.sum(tl.sqrt(tl.maximum(squared, 0.0)) * w_i[:, None], 0)
    best = tl.argmin(tl.where(w > 0.0, sums, float("inf")), 0)
    row = tl.load(gram + best * N + offs, mask=offs < N, other=0.0)
    own = _pick(row, best, N_PAD)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)
        row_i = tl.load(gram + best * N + i, mask=i < N, other=0.0)
        around = _rows(gram, i, N, N_PAD) - row - row_i[:, None] + own
        tl.store(K + i[:, None] * N + offs, around, mask=(i < N)[:, None] & (offs < N))
    tl.debug_barrier()
    squares = diagonal + own
    return best, (squares - 2 * row <= COINCIDENT * squares) | (offs >= N), squares


@triton.jit
def _first(chosen, place, N_PAD: tl.constexpr):
    """Of the chosen points the first along the line, the one of least index among equals; and its place."""
    at = tl.min(tl.where(chosen, place, float("inf")), 0)
    return tl.min(tl.where(chosen & (place == at), tl.arange(0, N_PAD), N_PAD), 0), at


@triton.jit
def _place(K, weights, far, length, i, N):
    """Where points i lie along the line to the farthest, and their weights; at the end those that have none."""
    w = tl.load(weights + i, mask=i < N, other=0.0)
    row = tl.load(K + far * N + i, mask=i < N, other=0.0)
    return tl.where(w > 0.0, row / tl.maximum(length, TINY), float("inf")), w


@triton.jit
def _median_segment(
    K, diagonal, w, weights, noise, N, N_PAD: tl.constexpr, ROWS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, N_PAD)
    squared = tl.where(w > 0.0, diagonal, 0.0)
    far = tl.argmax(squared, 0)
    row = tl.load(K + far * N + offs, mask=offs < N, other=0.0)
    top = _pick(squared, far, N_PAD)
    across = tl.where(w > 0.0, squared * top - row * row, 0.0)
    of_far = _pick(noise, far, N_PAD)
    rounding = noise * top + of_far * squared + (noise + of_far) * tl.abs(row)
    on_line = tl.max((across > 4 * rounding).to(tl.int32), 0) == 0
    length = tl.sqrt(top)
    place, _w = _place(K, weights, far, length, offs, N)
    below = tl.zeros([N_PAD], tl.float64)
    for start in range(0, N, ROWS):
        i = start + tl.arange(0, ROWS)
        place_i, w_i = _place(K, weights, far, length, i, N)
        before = (place_i[:, None] < place) | ((place_i[:, None] == place) & (i[:, None] <= offs))
        below += tl.sum(tl.where(before, w_i[:, None], 0.0), 0)
    begin, begins_at = _first((w > 0.0) & (below >= 0.5 - SLACK), place, N_PAD)
    end, ends_at = _first((w > 0.0) & (below > 0.5 + SLACK), place, N_PAD)
    halves = tl.where(offs == begin, 0.5, 0.0) + tl.where(offs == end, 0.5, 0.0)
    return on_line & (ends_at - begins_at > of_far / tl.maximum(length, TINY)), halves.to(tl.float64)


@triton.jit
def _escape(
    K, diagonal, w, here, pulls, norm, excess, room,
    N, N_PAD: tl.constexpr, ROWS: tl.constexpr, HALVINGS: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    s = tl.sum(pulls, 0)
    step = excess / tl.maximum(s * norm, TINY)
    along = pulls - s * here
    a = here
    lowest = 0.0 * s
    halving = 0
    while halving <= HALVINGS:  # the last trial is the mean
        trial = tl.where(halving < HALVINGS, here + step * along, w)
        _Ka, _q, _r, _v, _f, gain, _noise = _at(K, diagonal, w, trial, room, N, N_PAD, ROWS, ROUNDING)
        better = gain < lowest
        a = tl.where(better, trial, a)
        lowest = tl.minimum(gain, lowest)
        halving = tl.where(better & (halving < HALVINGS), HALVINGS, halving + 1)
        step *= 0.5
    return a


@triton.jit
def _newton(
    K, M, diagonal, w, a, max_steps, polish, room,
    N, N_PAD: tl.constexpr, ROWS: tl.constexpr, HALVINGS: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Coefficients and gap after at most max_steps steps, then polished so many times; as they are if `polish` is 0."""
    Ka, q, r, v, f, gain, noise = _at(K, diagonal, w, a, room, N, N_PAD, ROWS, ROUNDING)
    steps = 0
    while steps < max_steps:
        step = _newton_step(K, M, a, Ka, q, r, v, room, N, N_PAD, ROWS)
        allowed = gain + noise  # the full step may be taken where f stands still
        lower = gain - noise
        found = 0
        halving = 0
        while halving <= HALVINGS:
            target = tl.where(halving < HALVINGS, a + step, v / tl.sum(v, 0))
            Ka2, q2, r2, v2, f2, gain2, noise2 = _at(K, diagonal, w, target, room, N, N_PAD, ROWS, ROUNDING)
            if gain2 <= allowed:
                a, Ka, q, r, v, f, gain, noise = target, Ka2, q2, r2, v2, f2, gain2, noise2
                found = 1
                halving = HALVINGS
            allowed = lower
            step *= 0.5
            halving += 1
        steps = tl.where((found == 0) | (gain >= lower), max_steps, steps + 1)
    gap = _gap(K, w, a, r, v, f, room, N, N_PAD, ROWS)
    while polish > 0:
        near = v / tl.sum(v, 0)
        Ka2, q2, r2, v2, f2, gain2, noise2 = _at(K, diagonal, w, near, room, N, N_PAD, ROWS, ROUNDING)
        polish -= 1
        if polish > 0:
            target = near + _newton_step(K, M, near, Ka2, q2, r2, v2, room, N, N_PAD, ROWS)
            Ka2, q2, r2, v2, f2, gain2, noise2 = _at(K, diagonal, w, target, room, N, N_PAD, ROWS, ROUNDING)
            if gain2 <= gain + noise:
                a, v, gain, noise = target, v2, gain2, noise2
        else:
            last = _gap(K, w, near, r2, v2, f2, room, N, N_PAD, ROWS)
            if last <= tl.maximum(gap, 1e-13):
                a, gap = near, last
    return a, gap


@triton.jit
def solve_kernel(
    gram, weights, coefficients, gaps, statuses, around, scratch, N, max_steps, resolution,
    N_PAD: tl.constexpr, ROWS: tl.constexpr, CONVERGED: tl.constexpr, ANCHOR: tl.constexpr, COLLINEAR: tl.constexpr,
    HALVINGS: tl.constexpr, POLISH: tl.constexpr, ROUNDING: tl.constexpr, SLACK: tl.constexpr,
    COINCIDENT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, N_PAD)
    K = around + b * N * N
    weights += b * N
    M = scratch + b * (N + 2) * N
    room = M + N * N
    w = tl.load(weights + offs, mask=offs < N, other=0.0)
    best, there, squares = _recentre(gram + b * N * N, K, w, weights, N, N_PAD, ROWS, COINCIDENT)
    diagonal = _diagonal(K, offs, N)
    start = tl.where(offs == best, 1.0, 0.0).to(tl.float64)
    pulls = tl.where(there, 0.0, w / tl.sqrt(tl.where(there, 1.0, diagonal)))
    own = tl.sum(tl.where(there, w, 0.0), 0)
    norm = tl.sqrt(tl.maximum(tl.sum(pulls * _times(K, pulls, room, N, N_PAD, ROWS), 0), 0.0))
    excess = tl.maximum(norm - own, 0.0)
    gap = excess / tl.maximum(norm, TINY)
    is_segment, a = _median_segment(K, diagonal, w, weights, resolution * squares, N, N_PAD, ROWS, SLACK)
    status = CONVERGED
    if is_segment:
        status = COLLINEAR
    elif excess <= own * (4 * resolution):
        status = ANCHOR
        a = start
    else:
        a = _escape(K, diagonal, w, start, pulls, norm, excess, room, N, N_PAD, ROWS, HALVINGS, ROUNDING)
    if tl.max((a != start).to(tl.int32), 0) > 0:  # else: the best point is the median, or no step's gain can be seen
        steps = tl.where(is_segment, 0, max_steps)
        polish = tl.where(is_segment, 0, POLISH + 1)
        a, gap = _newton(K, M, diagonal, w, a, steps, polish, room, N, N_PAD, ROWS, HALVINGS, ROUNDING)
    tl.store(coefficients + b * N + offs, a, mask=offs < N)
    tl.store(gaps + b, gap)
    tl.store(statuses + b, status)


@on_its_device
def solve(gram: Tensor, weights: Tensor, tol: float, max_steps: int, resolution: float) -> by_torch.Solution:
    B, N = weights.shape
    if N > LARGEST or B == 0:
        return by_torch.solve(gram, weights, tol=tol, max_steps=max_steps, resolution=resolution)
    gram, weights = gram.contiguous(), (weights / weights.sum(1, keepdim=True)).contiguous()
    scratch = gram.new_empty(B, N + 2, N)
    coefficients, gap, around = torch.empty_like(weights), weights.new_empty(B), torch.empty_like(gram)
    status = weights.new_empty(B, dtype=torch.int64)
    chosen = plan(N)
    solve_kernel[B,](
        gram, weights, coefficients, gap, status, around, scratch, N, max_steps, resolution,
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        maxnreg=chosen.max_registers,
    )  # fmt: skip
    # Against tol here, since a kernel is given numbers in float32; `resolution` is a power of two.
    status = torch.where((status == by_torch.CONVERGED) & (gap > tol), by_torch.MAX_ITER, status)
    return by_torch.Solution(coefficients, gap, status, around)
