"""Pictures of a run, drawn from its loss.jsonl: the loss, and what its method adds to it."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from anabranch.common.files import replace_file
from anabranch.common.plot import draw_loss

from matplotlib.figure import Figure  # isort: skip  (behind the error that says how to get it)

CURVES = {"train_loss": "training (mean since the last entry)", "held_out_loss": "held out"}
WIDTH, HEIGHT, ROW = 9.0, 3.5, 0.11  # inches: of a figure, and of a layer in a heat map


def draw(log: Path) -> None:
    """loss.png beside a log, ranks.png where ranks change, experts.png where tokens pick blocks; as far as it goes."""
    if not log.is_file():
        return
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return
    draw_loss(log, log.with_name("loss.png"), CURVES, x="million tokens", y="nats per learnt token")
    if any("layer_ranks" in row for row in rows):
        draw_ranks(rows, log.with_name("ranks.png"))
    if any("usage" in row for row in rows):
        draw_experts(rows, log.with_name("experts.png"))


def draw_ranks(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The rank of each layer over steps, and at the last of them."""
    known = [row for row in rows if "layer_ranks" in row]
    names = _ordered(known[-1]["layer_ranks"])
    grid = [[row["layer_ranks"][name] for row in known] for name in names]
    edges = [0, *(row["step"] for row in known[1:]), max(rows[-1]["step"], known[-1]["step"] + 1)]
    figure = Figure(figsize=(WIDTH, _height(len(names))), layout="constrained")
    over, last = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    mesh = over.pcolormesh(edges, range(len(names) + 1), grid, cmap="viridis", vmin=0)
    _groups(over, names, "white")
    over.set_xlabel("step")
    figure.colorbar(mesh, ax=over, label="rank", pad=0.02, aspect=40)
    last.barh([y + 0.5 for y in range(len(names))], [row[-1] for row in grid], height=0.8, color="tab:blue")
    last.set_xlabel(f"rank at step {rows[-1]['step']}, {sum(row[-1] for row in grid)} in all")
    last.grid(alpha=0.3, axis="x")
    _groups(last, names, "tab:gray")
    last.tick_params(axis="y", labelleft=False)
    last.set_ylabel("")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def draw_experts(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How often each layer's blocks were picked lately, beside how uneven that was over steps."""
    latest = next(row for row in reversed(rows) if "usage" in row)
    names = _ordered(latest["usage"])
    shares = []
    for name in names:
        counts = latest["usage"][name]["counts"]
        shares.append([count * len(counts) / max(1, sum(counts)) for count in counts])
    figure = Figure(figsize=(WIDTH, _height(len(names))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    map_, cv, unused = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    blocks = len(shares[0])
    mesh = map_.pcolormesh(range(blocks + 1), range(len(names) + 1), shares, cmap="RdBu_r", vmin=0, vmax=2)
    _groups(map_, names, "black")
    details = [row for row in rows if "usage" in row]
    since = details[-2]["step"] + 1 if len(details) > 1 else 1
    map_.set_xlabel(f"block, picked in steps {since} to {latest['step']}")
    figure.colorbar(mesh, ax=map_, label="picks, 1 = as many as the others", extend="max", pad=0.02, aspect=40)
    for axes, key, label in ((cv, "cv", "std / mean of picks"), (unused, "unused", "share never picked")):
        spread = [[layer[key] for layer in row["usage"].values()] for row in details]
        steps = [row["step"] for row in details]
        axes.fill_between(
            steps, [min(x) for x in spread], [max(x) for x in spread], color="tab:gray", alpha=0.3, linewidth=0
        )
        means = [sum(x) / len(x) for x in spread]
        axes.plot(steps, means, color="tab:blue", linewidth=1, marker=".")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    unused.set_xlabel("step; line: mean of layers, grey: all")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def _ordered(names: Mapping[str, Any]) -> list[str]:
    """Layers of one kind (q_proj, …) together, kinds in the order in which they come."""
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    return sorted(names, key=lambda name: kinds.index(_kind(name)))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _height(layers: int) -> float:
    return min(12.0, max(HEIGHT, 1.0 + ROW * layers))


def _groups(axes: Any, names: Sequence[str], color: str) -> None:
    """Name the kinds of layers on the y axis, the first layer on top, with a line between kinds."""
    at, ticks = 0, []
    for kind, some in groupby(names, _kind):
        count = len(list(some))
        ticks.append((at + count / 2, kind))
        at += count
        if at < len(names):
            axes.axhline(at, color=color, linewidth=1)
    axes.set_yticks([y for y, _ in ticks], [kind for _, kind in ticks], fontsize="small")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names), 0)
    axes.set_ylabel("a row a layer, the first on top")
