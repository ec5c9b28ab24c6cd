"""The geometric median, the two reads it consists of and a composition, beside torch, geom-median and ByzFL.

Contenders of a case take turns, as everywhere; but medians of few steps do not agree with one another, so none is
refused for its result. Each result gets a certificate instead: (f(x) - f*) / f(x), bounded in float64 by what no
contender computes. Points are centred on zero, or lie around a mean ten times as long as they spread: from there three
steps that begin at zero do not arrive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregate.mixes import nearest_neighbour_mixing
from anabranch.aggregate.rules import after, aggregate
from anabranch.aggregate.rules import geometric_median as median_rule
from anabranch.bench.machine import Machine
from anabranch.bench.timing import Case, Contender, interleave, timed
from anabranch_kernels.geometric_median.op import centred_gram, combine, geometric_median
from anabranch_kernels.memory import prefer_huge_pages

STEPS = 10  # of the peer in torch: what federated code runs
SPREADS = 10  # lengths of spread between zero and the mean of points that are not centred
BYZFL_FLOATS = 1 << 28  # that ByzFL's mixing may copy: N (N - f) D numbers; both then take fewer columns
CENTRED, OFFSET = "centred", "offset"
HEADER = ("case", "contender", "ms", "p10 … p90", "reads", "gap_rel", "time / ours")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times of one contender in one case, in seconds and in plain reads of the points, and its certificate.

    seconds   of each call
    read_s    a plain read of as many bytes as the points have, measured in turn with the calls
    gap_rel   upper bound of (f(x) - f*) / f(x); None where the result is no median
    """

    case: str
    contender: str
    seconds: tuple[float, ...]
    read_s: float
    gap_rel: float | None

    @property
    def median_s(self) -> float:
        """Median time of one call."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianReport:
    """The table of one run; `absent` names the peers that did not run, and why."""

    title: str
    machine: Machine
    samples: tuple[Measured, ...]
    absent: tuple[str, ...] = ()

    @property
    def header(self) -> tuple[str, ...]:
        return HEADER

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each contender of each case; the first of a case is ours."""
        first: dict[str, Measured] = {}
        return [_row(one, first.setdefault(one.case, one)) for one in self.samples]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            "reads: the time in plain reads of the N * D points, taken in turn with the calls",
            "gap_rel: a bound of (f(x) - f*) / f(x) at the result, in float64; in bfloat16 x is rounded too",
            f"{OFFSET}: the mean is {SPREADS} times as long as the spread; {CENTRED}: it is about zero",
            *(f"not run: {peer}" for peer in self.absent),
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, each time included."""
        return {**asdict(self), "samples": [{**asdict(one), "median_s": one.median_s} for one in self.samples]}


def cloud(N: int, D: int, *, dtype: torch.dtype, data: str) -> Tensor:
    """Points [1, N, D] of which two fifths lie together, ten times as far from the others as these spread."""
    random = torch.Generator().manual_seed(N)
    points = prefer_huge_pages(torch.empty(1, N, D, dtype=dtype))
    mean = SPREADS * torch.randn(D, generator=random) if data == OFFSET else torch.zeros(D)
    for i in range(N):
        points[0, i] = torch.randn(D, generator=random).add_(mean).add_(10.0 if i < N * 2 // 5 else 0.0)
    return points


def medians(points: Tensor, *, peers: Sequence[Contender] = ()) -> list[Case]:
    """Gram matrix, combination and median of points [1, N, D], beside torch and these peers."""
    N, D = points.shape[1:]
    centre, a = points[:, 0], torch.full((1, N), 1 / N, dtype=torch.float64)
    what = f"N={N} D={D} {str(points.dtype).removeprefix('torch.')}"

    def contender(name: str, step: Callable[[], Tensor], *, reads: int, flops: int) -> Contender:
        return Contender(name=name, step=step, read_bytes=reads * points.nbytes, flops=flops)

    def gram() -> Tensor:
        rows = points[0].float() - centre.float()
        return rows @ rows.T

    pairs, sums, both = N * (N + 1) * D, 2 * N * D, N * (N + 3) * D
    steps = contender(f"torch {STEPS} steps", partial(weiszfeld, points[0]), reads=2, flops=both)
    return [
        Case(
            name=f"gram {what}",
            contenders=(
                contender("anabranch", lambda: centred_gram(points, centre)[0], reads=1, flops=pairs),
                contender("torch float32", gram, reads=1, flops=pairs),
            ),
        ),
        Case(
            name=f"combine {what}",
            contenders=(
                contender("anabranch", lambda: combine(points, a, centre)[0], reads=1, flops=sums),
                contender("torch", lambda: a[0].to(points.dtype) @ points[0], reads=1, flops=sums),
            ),
        ),
        Case(
            name=f"median {what}",
            contenders=(
                contender("anabranch", lambda: geometric_median(points).point[0], reads=2, flops=both),
                steps,
                *peers,
            ),
        ),
    ]


def composition(points: Tensor, f: int, *, peers: Sequence[Contender] = ()) -> Case:
    """The median of points [1, N, D] after each became the mean of the N - f nearest to it, and the bare median."""
    N, D = points.shape[1:]
    rule = after(partial(nearest_neighbour_mixing, f=f), median_rule)
    name = f"NNM f={f} and median N={N} D={D} {str(points.dtype).removeprefix('torch.')}"
    both = {"read_bytes": 2 * points.nbytes, "flops": N * (N + 3) * D}
    mixed = Contender(name="anabranch", step=lambda: aggregate(points[0], rule, centre=points[0, 0]), **both)
    bare = Contender(name="anabranch, median alone", step=lambda: geometric_median(points).point[0], **both)
    return Case(name=name, contenders=(mixed, bare, *peers))


def open_peers(points: Tensor) -> tuple[list[Contender], list[str]]:
    """Other libraries' medians of points [1, N, D] with their defaults; and why others are absent."""
    made: list[tuple[str, Callable[[Tensor], Callable[[], Tensor]]]] = [
        ("geom-median", _geom_median),
        ("byzfl 3 steps", _byzfl),
    ]
    return _open(points, made)


def open_mixed_peers(points: Tensor, f: int) -> tuple[list[Contender], list[str]]:
    """The same for the composition."""
    return _open(points, [("byzfl NNM and 3 steps", partial(_byzfl, f=f))])


def measure(
    case: Case, read: Callable[[], float], *, repeats: int, size: int, certify: Tensor | None = None
) -> list[Measured]:
    """Time the contenders of a case in turns with the plain read, whose bytes/s are `read`'s result.

    size      bytes of the points
    certify   points [1, N, D] of which the results are medians, to bound how far they are from the best
    """
    gaps = [None if certify is None else certificate(certify[0], one.step()) for one in case.contenders]
    *times, roofs = interleave(
        [*(timed(one.step) for one in case.contenders), read], repeats=repeats, warmup=0 if certify is not None else 1
    )
    return [
        Measured(case=case.name, contender=one.name, seconds=tuple(seconds), read_s=size / median(roofs), gap_rel=gap)
        for one, seconds, gap in zip(case.contenders, times, gaps, strict=True)
    ]


def measure_all(
    N: int, D: int, read: Callable[[], float], *, dtype: torch.dtype, data: str, repeats: int, peers: bool
) -> tuple[list[Measured], list[str]]:
    """All cases of N points of D numbers, and why peers are absent."""
    points = cloud(N, D, dtype=dtype, data=data)
    others, absent = open_peers(points) if peers else ([], [])
    gram, sums, whole = medians(points, peers=others)
    measured: list[Measured] = []
    for case, certify in ((gram, None), (sums, None), (whole, points)):
        named = Case(name=f"{case.name} {data}", contenders=case.contenders)
        measured += measure(named, read, repeats=repeats, size=points.nbytes, certify=certify)
    f = N // 4
    some = points[:, :, : min(D, BYZFL_FLOATS // (N * (N - f)))].contiguous()
    others, missing = open_mixed_peers(some, f) if peers else ([], [])
    for rows, mixed_peers in {len(points[0, 0]): (points, []), len(some[0, 0]): (some, others)}.values():
        case = composition(rows, f, peers=mixed_peers)
        named = Case(name=f"{case.name} {data}", contenders=case.contenders)
        measured += measure(named, read, repeats=repeats, size=rows.nbytes)
    return measured, [*absent, *missing]


def certificate(points: Tensor, x: Tensor) -> float:
    """Upper bound of (f(x) - f*) / f(x) for f(x) = sum_i ||x - p_i|| over points [N, D] and any x [D], in float64.

    Least of 2 ||g||, where g is the gradient of the mean distance, and of two dual bounds: unit vectors along p_i - x
    are made to sum to zero, by g each or by N g on the nearest, and shortened to at most one.
    """
    N = len(points)
    K = torch.zeros(N, N, dtype=torch.float64)
    for rows, middle in zip(points.split(1 << 16, 1), x.split(1 << 16), strict=True):
        differences = rows.double() - middle.double()  # p_i - x
        K += differences @ differences.T
    r = K.diagonal().sqrt()
    v = 1 / r.clamp_min(1e-300) / N
    Kv = K @ v
    g2 = max(0.0, float(v @ Kv))  # g = - sum v_i (p_i - x); <p_i - x, g> = - Kv
    f = float(r.mean())
    longest = (1 - 2 * N * v * Kv + g2).clamp_min(0).max().sqrt().clamp_min(1)
    by_all = (f - float(Kv.mean())) / float(longest)
    k = int(r.argmin())
    shortened = float((1 - 2 * N * N * v[k] * Kv[k] + N * N * g2).clamp_min(1).sqrt())
    by_one = (f - float(Kv[k])) / shortened
    return max(0.0, min(2 * math.sqrt(g2), 1 - max(by_all, by_one) / f))


def weiszfeld(points: Tensor) -> Tensor:
    """Steps from the mean, in torch: each reads the points three times."""
    x = points.float().mean(0)
    for _ in range(STEPS):
        v = 1 / torch.stack([torch.dist(row.float(), x) for row in points]).clamp_min(1e-6)
        x = ((v / v.sum()).to(points.dtype) @ points).float()
    return x


def _open(
    points: Tensor, made: list[tuple[str, Callable[[Tensor], Callable[[], Tensor]]]]
) -> tuple[list[Contender], list[str]]:
    N, D = points.shape[1:]
    peers, absent = [], []
    for name, make in made:
        try:
            step = make(points[0])
        except ImportError as error:
            absent.append(f"{name}: {error}; pip install 'anabranch[bench]'")
            continue
        peers.append(Contender(name=name, step=step, read_bytes=2 * points.nbytes, flops=N * (N + 3) * D))
    return peers, absent


def _geom_median(points: Tensor) -> Callable[[], Tensor]:
    from geom_median.torch import compute_geometric_median

    rows = list(points)
    return lambda: compute_geometric_median(rows).median


def _byzfl(points: Tensor, f: int | None = None) -> Callable[[], Tensor]:
    import byzfl

    rule = byzfl.GeometricMedian()
    if f is None:
        return lambda: rule(points)
    mix = byzfl.NNM(f)
    return lambda: rule(mix(points))


def _row(one: Measured, first: Measured) -> tuple[str, ...]:
    ordered = sorted(one.seconds)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return (
        one.case,
        one.contender,
        f"{one.median_s * 1e3:.1f}",
        f"{low * 1e3:.1f} … {high * 1e3:.1f}",
        f"{one.median_s / one.read_s:.2f}",
        "" if one.gap_rel is None else f"{one.gap_rel:.1e}",
        f"{one.median_s / first.median_s:.2f}",
    )
