"""Fair timing: contenders compute the same thing, take turns in one process, and read more than the caches hold.

Shared machines drift by tens of percent within a minute. Contenders that alternate (A B, B A, A B, ...) drift together,
and so does the roof, a plain read of the same number of bytes that is measured between them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to compute a case.

    step        does the work of one sample and returns its result
    read_bytes  what one step has to read from memory at least
    flops       multiplications and additions of one step
    tolerance   largest distance from the first contender's result, relative to that result's norm
    """

    name: str
    step: Callable[[], Tensor]
    read_bytes: int
    flops: int
    tolerance: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Contenders of one problem; the first is the one that the others are compared with.

    calls   how many calls of the op one step makes: the time reported is that of one call
    """

    name: str
    contenders: tuple[Contender, ...]
    calls: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """What this machine can do at best.

    read    measures, each time it is called, the bytes/s of a plain read that no cache serves
    flops   operations/s of the best matrix product
    """

    read: Callable[[], float]
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Times of one contender for one call, and the roofs seen while it was measured.

    tokens   how many tokens one call handles; 0 where that says nothing
    """

    case: str
    contender: str
    seconds: tuple[float, ...]
    read_bytes: int
    flops: int
    read_roof: float
    flops_roof: float
    tokens: int = 0

    @property
    def median_s(self) -> float:
        """Median time of one call."""
        return median(self.seconds)

    @property
    def roof_share(self) -> float:
        """The time that the nearer of the two roofs allows, over the time taken."""
        return max(self.read_bytes / self.read_roof, self.flops / self.flops_roof) / self.median_s


def interleave(
    runs: Sequence[Callable[[], Result]], *, repeats: int, warmup: int = 2, settle_s: float = 0.0
) -> list[list[Result]]:
    """Call every run `repeats` times, in turns, each second round in reverse; returns the results of each run.

    settle_s   pause before every call, for peers whose threads go on spinning after they are done
    """
    if not runs or repeats < 1 or warmup < 0:
        raise ValueError(f"need runs, repeats >= 1 and warmup >= 0, got {len(runs)} runs, {repeats=}, {warmup=}")
    results: list[list[Result]] = [[] for _ in runs]
    for turn in range(warmup + repeats):
        order = range(len(runs)) if turn % 2 == 0 else range(len(runs) - 1, -1, -1)
        for index in order:
            if settle_s:
                time.sleep(settle_s)
            result = runs[index]()
            if turn >= warmup:
                results[index].append(result)
    return results


def measure(case: Case, roofs: Roofs, *, repeats: int) -> list[Sample]:
    """Check that all contenders agree, then time them in turns; the plain read takes its turn too."""
    check_agreement(case)
    runs = [timed(contender.step) for contender in case.contenders]
    *times, read_roofs = interleave([*runs, roofs.read], repeats=repeats)
    return [
        Sample(
            case=case.name,
            contender=contender.name,
            seconds=tuple(value / case.calls for value in seconds),
            read_bytes=contender.read_bytes // case.calls,
            flops=contender.flops // case.calls,
            read_roof=median(read_roofs),
            flops_roof=roofs.flops,
        )
        for contender, seconds in zip(case.contenders, times, strict=True)
    ]


def check_agreement(case: Case) -> None:
    """ValueError names the first contender whose result is too far from the first one's."""
    first, *others = case.contenders
    expected = first.step().double()
    for contender in others:
        result = contender.step().double()
        if result.shape != expected.shape:
            raise ValueError(
                f"{case.name}: {contender.name} returns {list(result.shape)}, {first.name} {list(expected.shape)}"
            )
        distance = float((result - expected).norm() / expected.norm())
        if not distance <= contender.tolerance:  # NaN must fail too
            raise ValueError(
                f"{case.name}: {contender.name} is {distance:.2e} from {first.name}, allowed {contender.tolerance:.0e}"
            )


def best_flops(*, size: int = 1024, repeats: int = 5) -> float:
    """Operations/s of torch's matrix product of [size, size] by [size, size], in the faster of float32 and bfloat16."""
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(2, size, size).to(dtype)
        steps.append(timed(partial(torch.mm, left, right)))
    return 2.0 * size**3 / min(min(times) for times in interleave(steps, repeats=repeats))


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """The same step, giving the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run
