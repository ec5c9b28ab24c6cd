"""Cases of the coordinate-wise rules beside the same in torch and in ByzFL."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.coordinate_rules.op import coordinate_median, mean_around_median, trimmed_mean
from anabranch_kernels.memory import prefer_huge_pages

RULES = ("median", "trimmed mean", "mean around median")
ROWS = (8, 16, 32, 64, 128)
ELEMENTS = 80_000_000  # of all rows together: 10 million columns of 8 rows
CLOSE = 0.02

Step = Callable[[], Tensor]


def coordinate_rules(
    N: int, D: int, *, dtype: torch.dtype, rules: Sequence[str] = RULES, device: str | torch.device = "cpu"
) -> tuple[list[Case], list[str]]:
    """A case for each rule over N rows of D numbers, f = N / 4, and the peers that refuse, with their reasons."""
    random = torch.Generator(device).manual_seed(N)
    points = prefer_huge_pages(torch.empty(1, N, D, dtype=dtype, device=device))
    for row in points[0]:
        row.normal_(generator=random)
    x, f = points[0], N // 4
    cases, absent = [], []
    for rule in rules:
        name = f"{rule} N={N} D={D} {str(dtype).removeprefix('torch.')}"
        contenders = []
        for contender, step, tolerance in _steps(rule, points, x, f):
            try:
                step()
            except Exception as error:  # a peer's refusal is a result
                absent.append(f"{name}: {contender}: {type(error).__name__}: {str(error).strip()}")
                continue
            # Comparisons are no FLOP: one addition for each element stands for all.
            contenders.append(
                Contender(name=contender, step=step, read_bytes=points.nbytes, flops=N * D, tolerance=tolerance)
            )
        cases.append(Case(name=name, contenders=tuple(contenders)))
    return cases, absent


def _steps(rule: str, points: Tensor, x: Tensor, f: int) -> list[tuple[str, Step, float]]:
    """Name, step and tolerance of all contenders, ours first."""
    if rule == "median":
        return [
            ("anabranch", lambda: coordinate_median(points)[0], CLOSE),
            ("torch sort", lambda: _median(x), CLOSE),
            ("torch.median", lambda: x.median(0).values, math.inf),  # of an even number the lower middle one
            ("ByzFL", lambda: _byzfl().Median()(x), CLOSE),
        ]
    if rule == "trimmed mean":
        return [
            ("anabranch", lambda: trimmed_mean(points, f)[0], CLOSE),
            ("torch sort", lambda: x.sort(0).values[f : len(x) - f].mean(0), CLOSE),
            ("ByzFL", lambda: _byzfl().TrMean(f)(x), CLOSE),
        ]
    # In 16 bits distances to a median tie, and which of two values is nearer is anybody's choice.
    close = CLOSE if x.dtype == torch.float32 else 0.1
    return [
        ("anabranch", lambda: mean_around_median(points, f)[0], close),
        ("torch sort", lambda: _mean_around_median(x, f), close),
        ("ByzFL", lambda: _byzfl().Meamed(f)(x), close),
    ]


def _byzfl() -> ModuleType:
    """https://byzfl.epfl.ch, by its torch forms."""
    import byzfl

    return cast(ModuleType, byzfl)


def _median(x: Tensor) -> Tensor:
    ordered, N = x.sort(0).values, len(x)
    return (ordered[(N - 1) // 2] + ordered[N // 2]) / 2


def _trimmed_mean(x: Tensor, f: int) -> Tensor:
    return x.sort(0).values[f : len(x) - f].mean(0)


def _mean_around_median(x: Tensor, f: int) -> Tensor:
    nearest = (x - _median(x)).abs().topk(len(x) - f, 0, largest=False, sorted=False).indices
    return x.gather(0, nearest).mean(0)
