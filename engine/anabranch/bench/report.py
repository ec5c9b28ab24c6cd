"""Tables of measurements: for the terminal, as Markdown, as JSON, as a roofline picture. Losing rows stay in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from anabranch.bench.machine import Machine
from anabranch.bench.timing import Sample
from anabranch.common.files import replace_file

HEADER = ("case", "contender", "ms", "p10 … p90", "tokens/s", "GB/s", "GFLOP/s", "of roof", "time / ours")


class Table(Protocol):
    """What can be printed and saved. The first two columns are names, the others numbers."""

    @property
    def title(self) -> str: ...

    @property
    def header(self) -> tuple[str, ...]: ...

    def rows(self) -> list[tuple[str, ...]]:
        """One line each, under the header."""
        ...

    def notes(self) -> list[str]:
        """What stands under the table."""
        ...

    def numbers(self) -> dict[str, Any]:
        """Everything that was measured, for JSON."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything one table says; `absent` names the peers that did not run, and why."""

    title: str
    machine: Machine
    samples: tuple[Sample, ...]
    absent: tuple[str, ...] = ()

    @property
    def header(self) -> tuple[str, ...]:
        return HEADER

    def rows(self) -> list[tuple[str, ...]]:
        """One row per sample under HEADER; times are compared with the first contender of the same case."""
        first: dict[str, Sample] = {}
        for sample in self.samples:
            first.setdefault(sample.case, sample)
        return [_row(sample, first[sample.case]) for sample in self.samples]

    def notes(self) -> list[str]:
        """What stands under the table."""
        reads = [sample.read_roof / 1e9 for sample in self.samples]
        flops = [sample.flops_roof / 1e9 for sample in self.samples]
        return [
            self.machine.sentence(),
            f"roofs: plain read {min(reads):.1f} to {max(reads):.1f} GB/s, taken in turn with the calls; "
            f"best matrix product {max(flops):.0f} GFLOP/s",
            "of roof: the time that the nearer roof allows, over the median time",
            *(f"not run: {peer}" for peer in self.absent),
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, each time included."""
        samples = [{**asdict(one), "median_s": one.median_s, "roof_share": one.roof_share} for one in self.samples]
        return {**asdict(self), "samples": samples}


def to_text(report: Table) -> str:
    """Columns for a terminal."""
    rows = [report.header, *report.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(report.header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([report.title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *report.notes()])


def to_markdown(report: Table) -> str:
    """A table as GitHub shows it."""
    header = report.header
    lines = [f"# {report.title}", "", f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += [f"| {' | '.join(row)} |" for row in report.rows()]
    return "\n".join([*lines, "", *(f"- {note}" for note in report.notes())]) + "\n"


def to_json(report: Table) -> str:
    """Every number of the report."""
    return json.dumps(report.numbers(), indent=1) + "\n"


def save(
    report: Table, *, json_path: Path | None = None, markdown_path: Path | None = None, plot_path: Path | None = None
) -> None:
    """Write what was asked for; each file is whole or not there."""
    if json_path:
        replace_file(json_path, lambda path: path.write_text(to_json(report)))
    if markdown_path:
        replace_file(markdown_path, lambda path: path.write_text(to_markdown(report)))
    if plot_path:
        assert isinstance(report, Report)  # other tables have no roofs
        replace_file(plot_path, partial(draw_roofline, report))


def check_plot_library() -> None:
    """Say beforehand that a picture cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with: pip install 'anabranch[plot]'") from error


def draw_roofline(report: Report, path: Path) -> None:
    """PNG: operations per second over operations per byte, under the two measured roofs."""
    check_plot_library()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title=report.title)
    read = max(sample.read_roof for sample in report.samples)
    flops = max(sample.flops_roof for sample in report.samples)
    reach = [flops / read, *(sample.flops / sample.read_bytes for sample in report.samples)]
    corners = [min(reach) / 4, flops / read, max(reach) * 4]
    axes.plot(corners, [min(x * read, flops) / 1e9 for x in corners], color="black", label="measured roof")
    for index, name in enumerate(dict.fromkeys(sample.contender for sample in report.samples)):
        chosen = [sample for sample in report.samples if sample.contender == name]
        axes.plot(
            [sample.flops / sample.read_bytes for sample in chosen],
            [sample.flops / sample.median_s / 1e9 for sample in chosen],
            "osD^v<>pP*X"[index % 11],
            label=name,
        )
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def _row(sample: Sample, first: Sample) -> tuple[str, ...]:
    low, high = _percentile(sample.seconds, 0.1), _percentile(sample.seconds, 0.9)
    return (
        sample.case,
        sample.contender,
        f"{sample.median_s * 1e3:.3f}",
        f"{low * 1e3:.3f} … {high * 1e3:.3f}",
        f"{sample.tokens / sample.median_s:.1f}" if sample.tokens else "",
        f"{sample.read_bytes / sample.median_s / 1e9:.1f}",
        f"{sample.flops / sample.median_s / 1e9:.1f}",
        f"{sample.roof_share:.0%}",
        f"{sample.median_s / first.median_s:.2f}",
    )


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
