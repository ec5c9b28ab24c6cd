"""Figures and tables of the study of rank-wise routing: shares in per cent, differences within seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.common.paired import paired, spread
from anabranch.tune.teacher_run import TeacherRun
from anabranch.tune.teachers import Suite

PAIRS = (
    ("smora", "lora-8"),
    ("smora", "lora-64"),
    ("smora", "experts 8x8"),
    ("smora", "experts 8x8, Switch"),
    ("blocks of 4", "experts 8x8"),
    ("blocks of 4", "experts 8x8, Switch"),
    ("blocks of 2", "blocks of 4"),
    ("smora", "blocks of 2"),
    ("smora", "blocks of 4"),
    ("smora, released gate", "smora"),
    ("smora, softmax", "smora"),
)

Found = Mapping[TeacherRun, Mapping[str, Any]]


def collect(
    suites: Mapping[str, Suite],
    tried: Found,
    runs: Sequence[TeacherRun],
    balanced: Sequence[TeacherRun],
    varied: Mapping[str, Sequence[TeacherRun]],
    done: Found,
) -> dict[str, Any]:
    """Everything a reader may want to recompute: each seed's value stands beside the means.

    tried     the runs that chose rates; runs, balanced, varied: those compared, all of them in `done`
    """
    names = {suite: name for name, suite in suites.items()}
    cells: dict[tuple[str, str], list[TeacherRun]] = {}
    for run in runs:
        cells.setdefault((names[run.suite], run.method), []).append(run)
    left = {key: _percent(some, done) for key, some in cells.items()}
    return {
        "recipe": {"suites": {name: _fields(suite) for name, suite in suites.items()}, **_common(runs)},
        "rates": [
            {
                "suite": suite,
                "method": method,
                "lr": some[0].lr,
                "tried": {f"{run.lr:g}": tried[run]["left"] for run in tried if _key(run, names) == (suite, method)},
            }
            for (suite, method), some in cells.items()
        ],
        "methods": [
            {"suite": suite, "method": method, "left": left[suite, method], **spread(left[suite, method])}
            for suite, method in cells
        ],
        "paired": [
            {"suite": suite, "pair": [a, b], **paired(_minus(left[suite, a], left[suite, b]))}
            for suite in suites
            for a, b in PAIRS
        ],
        "explained": [
            {"suite": suite, "against": other, **_explained(left[suite, "smora"], left[suite, other])}
            for suite in suites
            for other in ("lora-64", "experts 8x8, Switch")
        ],
        "balance": _balance(names, balanced, done),
        "overlap": [
            {"suite": suite, "method": method, **_overlap([done[run] for run in some])}
            for (suite, method), some in cells.items()
            if done[some[0]]["within"] is not None
        ],
        "varied": _varied(suites, runs, varied, done),
    }


def _key(run: TeacherRun, names: Mapping[Suite, str]) -> tuple[str, str]:
    return names[run.suite], run.method


def _fields(suite: Suite) -> dict[str, Any]:
    return {name: getattr(suite, name) for name in ("tasks", "groups", "rank", "shared", "width", "code", "own")}


def _common(runs: Sequence[TeacherRun]) -> dict[str, Any]:
    return {"seeds": sorted({run.seed for run in runs}), "steps": runs[0].steps, "batch": runs[0].batch}


def _percent(runs: Sequence[TeacherRun], done: Found) -> list[float]:
    """What each run left to learn. ValueError for one that diverged."""
    values = []
    for run in runs:
        if done[run]["left"] is None:
            raise ValueError(f"{run.method} diverged on seed {run.seed} at lr {run.lr:g}; give another seed")
        values.append(round(100 * done[run]["left"], 5))
    return values


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _explained(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How much of what the other explains is explained, as a quotient of each seed."""
    return paired([(100 - x) / (100 - y) for x, y in zip(ours, theirs, strict=True)])


def _balance(names: Mapping[Suite, str], runs: Sequence[TeacherRun], done: Found) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, float], list[TeacherRun]] = {}
    for run in runs:
        rows.setdefault((names[run.suite], run.method, run.make().settings.balance), []).append(run)
    figures = []
    for (suite, method, u), some in rows.items():
        variation, off = ([done[run]["variation"] for run in rows[suite, method, key]] for key in (u, 0.0))
        figures.append(
            {
                "suite": suite,
                "method": method,
                "balance": u,
                "variation": paired(variation),
                "less_variation_than_off": paired(_minus(off, variation)),
                "dead": [done[run]["dead"] for run in some],
                "left": paired(_percent(some, done)),
            }
        )
    return figures


def _overlap(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    within, between = ([one[key] for one in found] for key in ("within", "between"))
    return {"within": spread(within), "between": spread(between), "more_within": paired(_minus(within, between))}


def _varied(
    suites: Mapping[str, Suite], runs: Sequence[TeacherRun], varied: Mapping[str, Sequence[TeacherRun]], done: Found
) -> list[dict[str, Any]]:
    """Means and paired differences under each condition, beside those of the same seeds without it."""
    one = next(iter(varied.values()))
    methods, seeds = list(dict.fromkeys(run.method for run in one)), {run.seed for run in one}
    figures = []
    for condition, some in {"as above": [run for run in runs if run.seed in seeds], **varied}.items():
        for name, suite in suites.items():
            left = {
                method: _percent([r for r in some if r.method == method and r.suite.own == suite.own], done)
                for method in methods
            }
            smora = left["smora"]
            minus = {method: paired(_minus(smora, left[method])) for method in methods if method != "smora"}
            means = {method: spread(values) for method, values in left.items()}
            figures.append({"suite": name, "condition": condition, "left": means, "smora_minus": minus})
    return figures


def markdown(figures: Mapping[str, Any]) -> str:
    """All tables."""
    recipe = figures["recipe"]
    seeds = len(recipe["seeds"])
    parts = [
        f"Left to learn, in per cent of the targets' energy; means of {seeds} seeds after {recipe['steps']} steps of "
        f"{recipe['batch']} tokens.",
        _methods(figures),
        "Differences within seeds in points, and Student's 95 % intervals:",
        _pairs(figures),
        "What smora explains, as a multiple of what another explains:",
        table(
            ("contents", "against", "multiple", "95 % interval"),
            [[r["suite"], r["against"], f"{r['mean']:.3f}", interval(r, ".3f")] for r in figures["explained"]],
        ),
        "How evenly ranks are used, by the step u of the biases (variation: standard deviation by mean of how often "
        "ranks are picked; dead: never picked, in the worst seed):",
        table(
            ("contents", "method", "u", "left", "variation", "95 % interval", "less than with u = 0", "dead"),
            [
                [
                    r["suite"], r["method"], f"{r['balance']:g}", f"{r['left']['mean']:.2f}",
                    f"{r['variation']['mean']:.3f}", interval(r["variation"], ".3f"),
                    interval(r["less_variation_than_off"], "+.3f"),
                    f"{max(r['dead']):.0%}",
                ]
                for r in figures["balance"]
            ],
        ),
        "Overlap of two tasks' mean gates (1: the same, 0: disjoint):",
        table(
            ("contents", "method", "sharing a subspace", "not sharing", "difference", "95 % interval"),
            [
                [
                    r["suite"], r["method"], f"{r['within']['mean']:.3f}", f"{r['between']['mean']:.3f}",
                    f"{r['more_within']['mean']:+.3f}", interval(r["more_within"], "+.3f"),
                ]
                for r in figures["overlap"]
            ],
        ),
        _conditions(figures),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _methods(figures: Mapping[str, Any]) -> str:
    suites = list(figures["recipe"]["suites"])
    rates = {(row["suite"], row["method"]): row["lr"] for row in figures["rates"]}
    cells = {(row["suite"], row["method"]): row for row in figures["methods"]}
    rows = []
    for method in dict.fromkeys(row["method"] for row in figures["methods"]):
        row = [method]
        for suite in suites:
            cell = cells[suite, method]
            sd = "–" if cell["sd"] is None else f"{cell['sd']:.2f}"
            row += [f"{cell['mean']:.2f}", sd, f"{rates[suite, method]:g}"]
        rows.append(row)
    return table(("", *(head for suite in suites for head in (suite, "sd", "rate"))), rows)


def _pairs(figures: Mapping[str, Any]) -> str:
    rows = [
        [row["suite"], " minus ".join(row["pair"]), f"{row['mean']:+.2f}", interval(row, "+.2f"), verdict(row)]
        for row in figures["paired"]
    ]
    return table(("contents", "", "mean", "95 % interval", "the first is"), rows)


def _conditions(figures: Mapping[str, Any]) -> str:
    first = figures["varied"][0]
    rows = []
    for row in figures["varied"]:
        said = {method: verdict(pair) for method, pair in row["smora_minus"].items()}
        named = [", ".join(m for m, word in said.items() if word == wanted) or "–" for wanted in ("better", "worse")]
        means = [f"{left['mean']:.2f}" for left in row["left"].values()]
        rows.append([row["suite"], row["condition"], *means, *named])
    seeds = len(next(iter(first["smora_minus"].values()))["differences"])
    heads = ("contents", "", *first["left"], "smora is better than", "and worse than")
    return f"Left to learn under other conditions, {seeds} seeds:\n\n" + table(heads, rows)


def verdict(row: Mapping[str, Any]) -> str:
    """What the interval of a difference in what is left allows to say."""
    half = row["half_width_95"]
    if half is None or abs(row["mean"]) <= half:
        return "not told apart"
    return "better" if row["mean"] < 0 else "worse"


def interval(row: Mapping[str, Any], form: str) -> str:
    """The 95 % interval of a `paired` row; a dash where there is none."""
    half = row["half_width_95"]
    return "–" if half is None else f"{row['mean'] - half:{form}} to {row['mean'] + half:{form}}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
