"""Small PNGs of a run, an aggregation or a study. Needs matplotlib: the optional extra `plot`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ImportError("drawing needs matplotlib: pip install 'anabranch[plot]'") from error

from anabranch.common.files import replace_file

STYLES = (("", "tab:gray"), (".", "tab:blue"))


def draw_loss(log: Path, path: Path, curves: Mapping[str, str], *, x: str, y: str) -> None:
    """Draw entries of a loss.jsonl against millions of tokens into a PNG.

    curves    key of an entry -> its label; the first is a line, the second has its points marked
    x, y      labels of the axes
    """
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for (key, label), (marker, color) in zip(curves.items(), STYLES, strict=True):
        points = [(entry["tokens"] / 1e6, entry[key]) for entry in entries if key in entry]
        if not points:
            continue
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, marker=marker, color=color, linewidth=1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def draw_clients(
    path: Path, names: Sequence[str], values: Sequence[float], pairwise: Sequence[Sequence[float]], *, label: str
) -> None:
    """Draw one bar per client, and the distances between all pairs of them as a heat map, into a PNG.

    values, pairwise   NaN where nothing is known
    label              of the bars
    """
    size = min(12.0, 3.0 + 0.25 * len(names))
    figure = Figure(figsize=(2 * size, size), layout="constrained")
    bars, map_ = figure.subplots(1, 2)
    ticks = range(len(names))
    bars.barh(ticks, values, color="tab:blue")
    bars.set_xlabel(label)
    bars.invert_yaxis()
    image = map_.imshow(pairwise, cmap="viridis")
    map_.set_xticks(ticks, [])
    figure.colorbar(image, ax=map_, label="distance", shrink=0.8)
    for axes, labels in ((bars, names), (map_, [""] * len(names))):
        axes.set_yticks(ticks, labels, fontsize="small")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def draw_seeds(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], *, x: str, log: bool = True) -> None:
    """Draw each seed's value as a dot and their mean as a bar, a row for each name and a panel for each title.

    panels    title -> name -> values; all panels have the same names
    log       a logarithmic axis; needs positive values
    """
    names = list(next(iter(panels.values())))
    size = (2 + 4 * len(panels), 1.2 + 0.3 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for row, name in enumerate(names):
            values = rows[name]
            axes.plot(values, [row] * len(values), ".", color="tab:blue", alpha=0.6)
            axes.plot([sum(values) / len(values)], [row], "|", color="black", markersize=12)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(x)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.grid(alpha=0.3)
        if log:
            axes.set_xscale("log")
    axes.invert_yaxis()  # shared
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
