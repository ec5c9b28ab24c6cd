"""What a comparison of trees came to: means with 95 % intervals over seeds, and differences paired by seed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from anabranch.federated.experiment import LAST
from anabranch.federated.tables import Interval, as_columns, as_markdown, interval, percent
from anabranch.federated.tree.experiment import AVERAGING, FIRST, TreeCourse, TreeResults
from anabranch.federated.tree.plan import BASE

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A variant under one noise; accuracies are means over the last ten rounds, `first` over the first five.

    root, leaves     mean of the nodes; leaves is None where only the root's model is told
    inner            of each height between leaves and root, upwards
    above            root less mean leaf
    first            of the root
    apart, apart_first  the root less the baseline's; None for the baseline itself
    wrong            share of the predictions of teachers that were wrong, first and last rounds
    link_bytes       a round and link, both directions, of each height
    before_bytes     of embeddings and labels, once, a link of each height
    averaging_bytes  what sending models of the leaves' size would take, a round and link
    seconds          of a round
    """

    variant: str
    noise: str
    root: Interval
    leaves: Interval | None
    inner: list[Interval]
    above: Interval | None
    first: Interval
    apart: Interval | None
    apart_first: Interval | None
    wrong: tuple[float, float] | None
    link_bytes: list[float]
    before_bytes: list[float]
    averaging_bytes: int
    seconds: float


def rows_of(results: TreeResults) -> list[Row]:
    """A row for each variant and noise, in the order of the runs; only seeds that all variants have count."""
    names = list(dict.fromkeys(one.variant for one in results.courses))
    rows = []
    for noise in dict.fromkeys(one.noise for one in results.courses):
        runs = {
            name: {one.seed: one for one in results.courses if (one.variant, one.noise) == (name, noise)}
            for name in names
        }
        means = {one.seed: one for one in results.averages if one.noise == noise}
        seeds = sorted(set.intersection(*map(set, runs.values()), *([set(means)] if means else [])))
        if not seeds:
            continue
        base = [runs[BASE][seed] for seed in seeds]
        top = len(base[0].sizes) - 1
        last, first = [one.last(top) for one in base], [one.first(top) for one in base]
        rows += [_row([runs[name][seed] for seed in seeds], last, first) for name in names]
        if means:
            mine = [means[seed].last() for seed in seeds]
            early = [fmean(scores[0]["accuracy"] for scores in means[seed].rounds[:FIRST]) for seed in seeds]
            model = FLOAT_BYTES * base[0].sizes[0]
            rows.append(Row(
                variant=AVERAGING, noise=noise, root=interval(mine), leaves=None, inner=[], above=None,
                first=interval(early), apart=_apart(mine, last), apart_first=_apart(early, first), wrong=None,
                link_bytes=[2.0 * model] * top, before_bytes=[0.0] * top, averaging_bytes=2 * model,
                seconds=fmean(means[seed].seconds / len(means[seed].rounds) for seed in seeds),
            ))  # fmt: skip
    return rows


def _row(runs: Sequence[TreeCourse], last: Sequence[float], first: Sequence[float]) -> Row:
    top = len(runs[0].sizes) - 1
    roots, leaves, early = (
        [getattr(run, of)(h) for run in runs] for of, h in (("last", top), ("last", 0), ("first", top))
    )
    links = [runs[0].heights.count(h) for h in range(top)]
    each = [entry for run in runs for entry in run.rounds]
    is_base = runs[0].variant == BASE
    return Row(
        variant=runs[0].variant, noise=runs[0].noise, root=interval(roots), leaves=interval(leaves),
        inner=[interval([run.last(h) for run in runs]) for h in range(1, top)],
        above=_apart(roots, leaves), first=interval(early),
        apart=None if is_base else _apart(roots, last), apart_first=None if is_base else _apart(early, first),
        wrong=(mean_wrong(runs, slice(FIRST)), mean_wrong(runs, slice(-LAST, None))),
        link_bytes=[
            fmean(entry["bytes"]["up"][h] + entry["bytes"]["down"][h] for entry in each) / links[h] for h in range(top)
        ],
        before_bytes=[runs[0].before[h] / links[h] for h in range(top)],
        averaging_bytes=2 * FLOAT_BYTES * runs[0].sizes[0],
        seconds=fmean(run.seconds / len(run.rounds) for run in runs),
    )  # fmt: skip


def _apart(values: Sequence[float], others: Sequence[float]) -> Interval:
    return interval([a - b for a, b in zip(values, others, strict=True)])


def wrong_share(run: TreeCourse, rounds: slice) -> float:
    """Of what teachers handed on in some rounds, the share whose largest entry was not the class."""
    chosen = run.rounds[rounds]
    return sum(sum(entry["wrong"]) for entry in chosen) / sum(sum(entry["told"]) for entry in chosen)


def mean_wrong(runs: Sequence[TreeCourse], rounds: slice) -> float:
    """The same, mean over runs."""
    return fmean(wrong_share(run, rounds) for run in runs)


def about(results: TreeResults) -> list[str]:
    """What was compared, in sentences."""
    plan, data, s = results.plan, results.data, results.plan.plan.schedule
    settings = [f"{name} {value}" for name, value in asdict(plan.settings).items() if name != "networks"]
    return [
        f"{data.name}: {len(data.y)} samples of {data.classes} classes with the leaves, {plan.public:.0%} of all put "
        f"aside for the bridge, {len(data.test_y)} to test on; a root, then {' and '.join(map(str, plan.tree))} nodes, "
        f"{plan.plan.partition}; {s.rounds} rounds, batches of {s.batch}, lr {s.lr:g}",
        f"{BASE}: networks {', '.join(plan.settings.networks)} from leaves to root; {', '.join(settings)}",
        f"accuracy in % on the test, mean of the last {min(LAST, s.rounds)} rounds (early: of the first "
        f"{min(FIRST, s.rounds)}), ± 95 % of Student's t over {plan.plan.seeds} seed{'s' * (plan.plan.seeds != 1)}; "
        f"differences from {BASE}, paired by seed",
        *(["stopped before all runs were done; go on with --resume"] if results.interrupted else []),
    ]


def grid(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A header and a line for each row."""
    inner = max((len(row.inner) for row in rows), default=0)
    middle = ["edges"] if inner == 1 else [f"height {h + 1}" for h in range(inner)]
    noisy = len({row.noise for row in rows}) > 1
    lines = [(
        "variant", *(["noise"] if noisy else []), "root", "difference", *reversed(middle), "leaves", "root − leaves",
        "root, early", "difference, early", "wrong, early → late",
    )]  # fmt: skip
    for row in rows:
        spread = [percent(one) for one in reversed(row.inner)] or ["–"] * inner
        lines.append((
            row.variant, *([row.noise] if noisy else []), percent(row.root), _signed(row.apart), *spread,
            percent(row.leaves) if row.leaves else "–", _signed(row.above),
            percent(row.first), _signed(row.apart_first),
            f"{row.wrong[0]:.0%} → {row.wrong[1]:.0%}" if row.wrong else "–",
        ))  # fmt: skip
    return lines


def _signed(value: Interval | None) -> str:
    return percent(value, signed=True) if value else "–"


def traffic(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A header, and for each height of links the bytes of a round and link beside those of sending models."""
    lines: list[tuple[str, ...]] = [(
        "link of height", "once: embeddings and labels", "a round, both ways: predictions, samples of leaves that move",
        "sending the leaves' model instead",
    )]  # fmt: skip
    row = next((row for row in rows if row.leaves), None)
    for h in range(len(row.link_bytes) if row else 0):
        assert row is not None
        lines.append((
            f"{h} → {h + 1}", f"{row.before_bytes[h]:,.0f}", f"{row.link_bytes[h]:,.0f}", f"{row.averaging_bytes:,}"
        ))  # fmt: skip
    return lines


def to_text(results: TreeResults) -> str:
    """Columns for a terminal."""
    rows = rows_of(results)
    parts = list(about(results))
    for lines in (grid(rows), traffic(rows)):
        parts += ["", *as_columns(lines)]
    return "\n".join(parts)


def to_markdown(results: TreeResults) -> str:
    """Tables as GitHub shows them."""
    rows = rows_of(results)
    parts = [*(f"- {sentence}" for sentence in about(results))]
    for lines in (grid(rows), traffic(rows)):
        parts += ["", *as_markdown(lines)]
    return "\n".join(parts) + "\n"


def numbers(results: TreeResults) -> dict[str, Any]:
    """Everything, for JSON."""
    plan = results.plan
    return {
        "plan": {
            "variants": {name: asdict(one) for name, one in plan.variants().items()}, "noise": list(plan.plan.noise),
            "seeds": plan.plan.seeds, "first_seed": plan.plan.schedule.seed, "data": results.data.name,
            **plan.identity(),
        },
        "interrupted": results.interrupted,
        "table": [asdict(row) for row in rows_of(results)],
        "runs": [asdict(course) for course in results.courses],
        "averaging": [asdict(course) for course in results.averages],
    }  # fmt: skip
