"""Tables and a picture of the study of ranks, from the results of its runs."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from anabranch.common.files import replace_file

Results = dict[str, list[dict[str, Any]]]
PAIRS = (  # of methods, by what is unlearnt: what the paper's claims and their explanation come down to
    ("linear", "LoRA-6"),
    ("linear", "AdaLoRA"),
    ("linear", "power"),
    ("linear", "constant"),
    ("linear, early looks", "linear"),
    ("linear, orthonormal", "linear"),
    ("linear, by probe", "linear"),
    ("linear, by probe", "LoRA-6"),
    ("linear, by lack", "linear"),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; the width of a single value is infinite."""
    if len(values) < 2:
        return mean(values), float("inf")
    from scipy.stats import t

    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± half width, a dash where there is nothing."""
    if not values:
        return "–"
    centre, half = interval(values)
    return f"{centre:.{digits}f}" + (f" ± {half:.{digits}f}" if half < float("inf") else "")


def markdown(results: Results) -> str:
    """All tables."""
    lines: list[str] = []
    if "teachers" in results:
        lines += teachers(results["teachers"])
    if "texts" in results:
        lines += texts(results["texts"])
    return "\n".join(lines) + "\n"


def teachers(runs: list[dict[str, Any]]) -> list[str]:
    seeds = len({run["seed"] for run in runs})
    lines = [
        f"Twelve teachers of rank 1 to 12, {seeds} seeds; means with 95 % intervals, medians of times. Unlearnt: share "
        "of the teachers' energy at the end. Order: Spearman's correlation of final with true ranks. Foresight: the "
        "same of a look's scores with what each layer lacked at that time.",
        "",
        "| method | unlearnt | order | foresight | ranks in all | parameters | CPU s | of it choosing ranks |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, group in by_method(runs).items():
        share = median(run["choosing_s"] / run["seconds"] for run in group)
        cells = [method, shown(of(group, "unlearnt")), shown(of(group, "order"), 2), shown(of(group, "foresight"), 2)]
        cells += [f"{mean(sum(run['ranks']) for run in group):.0f}", f"{mean(of(group, 'parameters')):.0f}"]
        cells += [f"{median(of(group, 'seconds')):.1f}", f"{share:.2%}" if share else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What is unlearnt, differences within seeds:", ""]
    found = {method: {run["seed"]: run["unlearnt"] for run in group} for method, group in by_method(runs).items()}
    for one, other in PAIRS:
        if one in found and other in found:
            lines.append(f"- {reading(one, other, [found[one][s] - found[other][s] for s in found[one]])}")
    return lines


def reading(one: str, other: str, differences: Sequence[float]) -> str:
    """One sentence on a paired difference: its sign if the interval excludes zero, otherwise that it cannot tell."""
    centre, half = interval(differences)
    if not abs(centre) > half:
        return f"**{one}** and **{other}** cannot be told apart: {shown(differences)} includes zero."
    word = "more" if centre > 0 else "less"
    return f"**{one}** leaves {word} than **{other}**: {centre:+.3f} ± {half:.3f}."


def texts(runs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for task in dict.fromkeys(run["task"] for run in runs):
        group = [run for run in runs if run["task"] == task]
        lines += [
            "",
            f"{task}, {len({run['seed'] for run in group})} seeds: accuracy, and the mean rank of layers.",
            "",
        ]
        methods = by_method(group)
        depth, parts = places(next(run["ranks"] for run in group if run["ranks"]))
        head = [*(f"block {block}" for block in depth), *parts]
        lines += [
            f"| method | accuracy | CPU s | of it choosing ranks | {' | '.join(head)} |",
            "|---|---:|---:|---:|" + "---:|" * len(head),
        ]
        for method, some in methods.items():
            share = median(run["choosing_s"] / run["seconds"] for run in some)
            cells = [method, shown(of(some, "accuracy")), f"{median(of(some, 'seconds')):.1f}"]
            cells.append(f"{share:.2%}" if some[0]["ranks"] else "–")
            for place in (*depth, *parts):
                found = [mean(r for name, r in run["ranks"].items() if place in name.split(".")) for run in some
                         if run["ranks"]]  # fmt: skip
                cells.append(shown(found, 1))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def places(ranks: dict[str, int]) -> tuple[list[str], list[str]]:
    """Blocks and kinds of layer, of names such as `3.mlp.up_proj`."""
    names = [name.split(".") for name in ranks]
    return list(dict.fromkeys(name[0] for name in names)), list(dict.fromkeys(name[-1] for name in names))


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [run for run in runs if run["method"] == name] for name in dict.fromkeys(r["method"] for r in runs)}


def of(runs: list[dict[str, Any]], key: str) -> list[float]:
    """Values of the runs that have one."""
    return [run[key] for run in runs if run[key] is not None]


def draw(results: Results, path: Path) -> None:
    """PNG: final over true ranks, what is unlearnt over time, ranks of the layers of each task."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("drawing needs matplotlib: pip install 'anabranch[study]'") from error

    tasks = list(dict.fromkeys(run["task"] for run in results.get("texts", [])))
    panels = 2 * ("teachers" in results) + len(tasks)
    figure = Figure(figsize=(4.6 * panels, 4.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if "teachers" in results:
        groups = by_method(results["teachers"])
        for index, (method, group) in enumerate(groups.items()):
            means = [mean(ranks) for ranks in zip(*(run["ranks"] for run in group), strict=True)]
            style = {"marker": "osD^v<>pP*X"[index % 11], "markersize": 3, "linewidth": 0.9, "label": method}
            axes[0].plot(range(1, len(means) + 1), means, **style)
            course = [mean(values) for values in zip(*(run["course"] for run in group), strict=True)]
            axes[1].plot([(i + 1) / len(course) for i in range(len(course))], course, **style)
        axes[0].plot([1, len(means)], [1, len(means)], color="black", linewidth=0.5)
        axes[0].set(xlabel="true rank", ylabel="final rank, mean of seeds")
        axes[1].set(xlabel="share of the steps", ylabel="unlearnt", ylim=(0, 1))
        axes[0].legend(fontsize="x-small", frameon=False)
    for panel, task in zip(axes[2 * ("teachers" in results) :], tasks, strict=True):
        group = [run for run in results["texts"] if run["task"] == task and run["method"] == "TriAdapt"]
        depth, parts = places(group[0]["ranks"])
        table = [
            [mean(ranks for run in group for name, ranks in run["ranks"].items() if {b, p} <= set(name.split(".")))
             for p in parts] for b in depth
        ]  # fmt: skip
        image = panel.imshow(table, cmap="viridis", vmin=0)
        panel.set_title(f"TriAdapt's ranks, {task}", fontsize="medium")
        panel.set_yticks(range(len(depth)), [f"block {block}" for block in depth], fontsize="small")
        panel.set_xticks(range(len(parts)), parts, rotation=60, fontsize="small")
        figure.colorbar(image, ax=panel, shrink=0.6)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
