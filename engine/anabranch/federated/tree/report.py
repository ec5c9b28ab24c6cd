"""A comparison of trees as one HTML page that needs nothing else: curves of every tier, bytes, repaired predictions."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

from anabranch.federated import report
from anabranch.federated.charts import Series, line_chart
from anabranch.federated.tree.experiment import AVERAGING, TreeCourse, TreeResults
from anabranch.federated.tree.plan import BASE
from anabranch.federated.tree.tables import about, grid, rows_of, traffic, wrong_share

BANDS = "<p>Lines: mean over seeds. Bands: from the lowest to the highest. Point at a line to see it alone.</p>"


def page(results: TreeResults) -> str:
    """The whole document."""
    rows = rows_of(results)
    parts = [f"<p>{escape(sentence)}.</p>" for sentence in about(results)]
    parts += [report.table(grid(rows)), "<h2>What crosses a link, in bytes</h2>", report.table(traffic(rows))]
    for noise in dict.fromkeys(one.noise for one in results.courses):
        parts.append(_section(results, [one for one in results.courses if one.noise == noise], noise))
    title = f"A tree learns {escape(results.data.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{report.STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )


def _section(results: TreeResults, courses: Sequence[TreeCourse], noise: str) -> str:
    """All about one noise."""
    variants = list(dict.fromkeys(one.variant for one in courses))
    runs = {name: [one for one in courses if one.variant == name] for name in variants}
    top = len(courses[0].sizes) - 1
    tiers = ["leaves", *(["edges"] if top == 2 else [f"height {h}" for h in range(1, top)]), "root"]
    roots = [_series(name, [_accuracies(one, top) for one in runs[name]]) for name in variants]
    means = [one for one in results.averages if one.noise == noise]
    if means:
        roots.append(report.curve(AVERAGING, means, 0))
    within = [_series(tiers[h], [_accuracies(one, h) for one in runs[BASE]]) for h in reversed(range(top + 1))]
    amiss = [
        _series(name, [[wrong_share(one, slice(i, i + 1)) for i in range(len(one.rounds))] for one in runs[name]])
        for name in variants
    ]
    cards = (
        ("The root, round by round", roots, "accuracy in %"),
        (f"Every tier of {BASE}", within, "accuracy in %"),
        ("Predictions of teachers that are wrong, which a rule repairs", amiss, "of all predictions in %"),
    )
    return f"<h2>Noise <code>{escape(noise)}</code></h2>" + "".join(
        f'<div class="card"><h3>{escape(title)}</h3>{line_chart(series, x="round", y=y)}{BANDS}</div>'
        for title, series, y in cards
    )


def _accuracies(course: TreeCourse, height: int) -> list[float]:
    return [course.of_height(height, i) for i in range(len(course.rounds))]


def _series(name: str, values: Sequence[Sequence[float]]) -> Series:
    each = list(zip(*values, strict=True))
    return Series(
        name, range(1, len(each) + 1), [fmean(of) for of in each], [min(of) for of in each], [max(of) for of in each]
    )
