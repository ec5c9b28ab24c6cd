"""What a comparison came to: means with 95 % intervals over seeds, and differences from a baseline seed by seed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from anabranch.federated.evaluate import effective_rank
from anabranch.federated.experiment import LAST, Course, Results

BASELINE, CLEAN = "fedavg", "clean"
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean, and half the width of its interval by Student's t; None of a single value, which says nothing of it."""

    mean: float
    half: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A network of a method under one noise.

    accuracies   one a seed, each the mean of the last ten rounds
    best         mean over seeds of the best round's: what stopping in time would have given
    difference   of the accuracies from the baseline's first network, paired by seed; None for the baseline itself
    closed       the difference as a share of what the noise costs the baseline, in the mean; None without clean runs,
                 or where the noise costs nothing
    f1, loss     means over seeds, of the last ten rounds
    rank         effective rank of the features on the test, in the end
    found        F1 of the clients that were called noisy, mean over the seeds that have one
    labels       shares of right labels given to those, or to all, and learned: means over the seeds that have some
    seconds      of a run's rounds, mean over seeds
    """

    method: str
    noise: str
    network: int
    accuracies: list[float]
    accuracy: Interval
    best: float
    difference: Interval | None
    closed: Interval | None
    f1: float
    loss: float
    rank: float
    found: float | None
    labels: tuple[float, float] | None
    seconds: float


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, taken to be normal."""
    if len(values) < 2:
        return Interval(mean=fmean(values), half=None)
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1))
    return Interval(mean=fmean(values), half=quantile * stdev(values) / len(values) ** 0.5)


def rows_of(courses: Sequence[Course]) -> list[Row]:
    """A row for each method, noise and network, in the order of the courses; only seeds that all methods have count."""
    methods, noises = (list(dict.fromkeys(getattr(one, name) for one in courses)) for name in ("method", "noise"))
    by_run = {(one.method, one.noise, one.seed): one for one in courses}
    baseline = next((name for name in methods if name.partition(":")[0] == BASELINE), methods[0]) if methods else ""
    rows = []
    for noise in noises:
        seeds = sorted({one.seed for one in courses if all((name, noise, one.seed) in by_run for name in methods)})
        for method in methods if seeds else ():
            runs = [by_run[method, noise, seed] for seed in seeds]
            base = [by_run[baseline, noise, seed].last() for seed in seeds]
            clean = [by_run[baseline, CLEAN, seed].last() for seed in seeds if (baseline, CLEAN, seed) in by_run]
            lost = fmean(clean) - fmean(base) if len(clean) == len(seeds) else 0.0
            mended = [run.labels for run in runs if run.labels is not None]
            for network in range(len(runs[0].confusion)):
                accuracies = [run.last(network=network) for run in runs]
                apart = [a - b for a, b in zip(accuracies, base, strict=True)]
                rows.append(Row(
                    method=method, noise=noise, network=network, accuracies=accuracies, accuracy=interval(accuracies),
                    best=fmean(run.best(network=network) for run in runs),
                    difference=None if method == baseline and not network else interval(apart),
                    closed=interval([a / lost for a in apart]) if lost > 0 else None,
                    f1=fmean(run.last("f1", network) for run in runs),
                    loss=fmean(run.last("loss", network) for run in runs),
                    rank=fmean(effective_rank(torch.tensor(run.spectrum[network]).double()) for run in runs),
                    found=fmean(scored) if (scored := [run.found for run in runs if run.found is not None]) else None,
                    labels=(fmean(m[0] for m in mended), fmean(m[1] for m in mended)) if mended else None,
                    seconds=fmean(run.seconds for run in runs),
                ))  # fmt: skip
    return rows


def called(row: Row) -> str:
    """The method, and which of its networks if it is not the first."""
    return row.method if not row.network else f"{row.method} (network {row.network + 1})"


def percent(value: Interval, *, signed: bool = False) -> str:
    """`96.5 ± 0.6`, in hundredths."""
    mean = f"{value.mean * 100:+.1f}" if signed else f"{value.mean * 100:.1f}"
    return mean if value.half is None else f"{mean} ± {value.half * 100:.1f}"


def about(results: Results) -> list[str]:
    """What was compared, in sentences."""
    plan, data = results.plan, results.data
    s = plan.schedule
    network = f"mlp of {', '.join(map(str, plan.hidden)) or 'no'} hidden" if plan.network == "mlp" else plan.network
    return [
        f"{data.name}: {len(data.y)} samples of {data.classes} classes, {len(data.test_y)} to test on; {plan.clients} "
        f"clients, {s.cohort_size(plan.clients)} in a round, {plan.partition}; {network}; {s.rounds} rounds of "
        f"{s.epochs} epochs, batches of {s.batch}, lr {s.lr:g}",
        f"accuracy in % on the test, mean of the last {min(LAST, s.rounds)} rounds, ± 95 % of Student's t over "
        f"{plan.seeds} seed{'s' * (plan.seeds != 1)}; beside it the difference from the baseline, paired by seed, and "
        "how much of what the noise costs the baseline it wins back",
        *([secured(results)] if plan.secure else []),
        *(["stopped before all runs were done; go on with --resume"] if results.interrupted else []),
    ]


def secured(results: Results) -> str:
    """How the means were summed."""
    from anabranch.federated.private import sum_settings

    s = sum_settings(results.plan.secure or "")
    clipped = sum(one.clipped for one in results.courses)
    return (
        f"means are secure sums: the server and {s.privacy} clients together learn no more; {s.dropouts} may fall "
        f"silent, {s.errors} lie. Numbers within ±{s.clip:g}, {s.fraction_bits} bits after the point; {clipped} were "
        f"clipped"
    )


def grid(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A header and a line for each method: its accuracies under each noise, and in brackets the differences from the
    baseline and the shares of the gap that they close.
    """
    noises = list(dict.fromkeys(row.noise for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        closed = f"; {row.closed.mean:.0%}" if row.closed else ""
        apart = f" ({percent(row.difference, signed=True)}{closed})" if row.difference else ""
        cells.setdefault(called(row), {})[row.noise] = percent(row.accuracy) + apart
    return [("method", *noises), *((name, *(of.get(noise, "–") for noise in noises)) for name, of in cells.items())]


DETAILS = ("method", "accuracy", "difference", "gap closed", "best - last", "F1", "loss", "rank of features",
           "clients found (F1)", "right labels", "seconds")  # fmt: skip


def details(row: Row) -> tuple[str, ...]:
    """The rest of what is known of a row, in the order of DETAILS."""
    return (
        called(row), percent(row.accuracy), percent(row.difference, signed=True) if row.difference else "baseline",
        f"{percent(row.closed)} %" if row.closed and row.difference else "–",
        f"{(row.best - row.accuracy.mean) * 100:.1f}", f"{row.f1 * 100:.1f}", f"{row.loss:.3g}", f"{row.rank:.1f}",
        "–" if row.found is None else f"{row.found:.2f}",
        "–" if row.labels is None else f"{row.labels[0] * 100:.1f} -> {row.labels[1] * 100:.1f}",
        f"{row.seconds:.1f}",
    )  # fmt: skip


def to_text(results: Results) -> str:
    """Columns for a terminal."""
    return "\n".join([*about(results), "", *as_columns(grid(rows_of(results.courses)))])


def as_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """A header, a rule and lines whose cells stand below each other."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    header, *others = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return [header, "-" * max(map(len, (header, *others))), *others]


def to_markdown(results: Results) -> str:
    """Tables as GitHub shows them: one of all accuracies, and one with everything for each noise."""
    rows = rows_of(results.courses)
    parts = ["# Federated learning with noisy labels", "", *(f"- {sentence}" for sentence in about(results)), ""]
    parts += as_markdown(grid(rows))
    for noise in dict.fromkeys(row.noise for row in rows):
        parts += [
            "",
            f"## {noise}",
            "",
            *as_markdown([DETAILS, *(details(row) for row in rows if row.noise == noise)]),
        ]
    return "\n".join(parts) + "\n"


def as_markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """A header and lines as GitHub shows them: the first column to the left, the others to the right."""
    header, *others = (f"| {' | '.join(line)} |" for line in lines)
    return [header, "|---|" + "---:|" * (len(lines[0]) - 1), *others]


def numbers(results: Results) -> dict[str, Any]:
    """Everything, for JSON."""
    plan = results.plan
    return {
        "plan": {"methods": list(plan.method), "noise": list(plan.noise), "seeds": plan.seeds,
                 "first_seed": plan.schedule.seed, "data": results.data.name, **plan.identity()},
        "interrupted": results.interrupted,
        "table": [asdict(row) for row in rows_of(results.courses)],
        "runs": [asdict(course) for course in results.courses],
    }  # fmt: skip
