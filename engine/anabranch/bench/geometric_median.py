"""Cases of the geometric median and of the two reads that it consists of, beside the same in torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.geometric_median.op import centred_gram, combine, geometric_median
from anabranch_kernels.memory import prefer_huge_pages

STEPS = 10  # of the peer's: what federated code runs, and far from converged where points spread unevenly


def medians(N: int, D: int, *, dtype: torch.dtype) -> list[Case]:
    """Gram matrix, combination and median of N rows of D numbers, of which a quarter lies apart from the others."""
    random = torch.Generator().manual_seed(N)
    points = prefer_huge_pages(torch.empty(1, N, D, dtype=dtype))
    for i in range(N):
        points[0, i] = torch.randn(D, generator=random) + (0.5 if i < N // 4 else 0.0)
    centre, a = points[:, 0], torch.rand(1, N, generator=random, dtype=torch.float64)
    a /= a.sum()
    size = points.nbytes

    def case(name: str, ours: Callable[[], Tensor], peer: str, theirs: Callable[[], Tensor], reads: int) -> Case:
        flops = {"gram": N * (N + 1) * D, "combine": 2 * N * D, "median": N * (N + 3) * D}[name]
        steps = (("anabranch", ours), (peer, theirs))
        return Case(
            name=f"{name} N={N} D={D} {str(dtype).removeprefix('torch.')}",
            contenders=tuple(
                Contender(name=contender, step=step, read_bytes=reads * size, flops=flops) for contender, step in steps
            ),
        )

    def gram() -> Tensor:
        rows = points[0].float() - centre.float()
        return rows @ rows.T

    return [
        case("gram", lambda: centred_gram(points, centre)[0], "torch float32", gram, 1),
        case("combine", lambda: combine(points, a, centre)[0], "torch", lambda: a[0].to(dtype) @ points[0], 1),
        case("median", lambda: geometric_median(points).point[0], f"torch {STEPS} steps", lambda: _steps(points[0]), 2),
    ]


def _steps(points: Tensor) -> Tensor:
    """Weiszfeld's steps from the mean, in torch: each reads the points three times."""
    x = points.float().mean(0)
    for _ in range(STEPS):
        v = 1 / torch.stack([torch.dist(row.float(), x) for row in points]).clamp_min(1e-6)
        x = ((v / v.sum()).to(points.dtype) @ points).float()
    return x
