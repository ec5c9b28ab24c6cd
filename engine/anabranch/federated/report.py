"""A comparison as one HTML page that needs nothing else: no network, no script; light or dark as the system is."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

from anabranch.federated.charts import Series, dots, heat_map, line_chart
from anabranch.federated.experiment import Course, Results
from anabranch.federated.tables import DETAILS, Row, about, called, details, percent, rows_of

MOST_SEEN = 30  # classes above which a matrix is left out: its cells would be dust
STYLE = """
:root { --bg: #fbfbf9; --fg: #1c1d21; --dim: #6b6e76; --line: #dcdcd6; --card: #fff; --good: #1a8f5a; --bad: #c8443a;
  --c0: #2563b8; --c1: #d97706; --c2: #16875a; --c3: #b83280; --c4: #7c5cc4; --c5: #0e8fa3; --c6: #9a6b2f;
  --c7: #c0392b; --c8: #5b6b7b; --c9: #7a9a01; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171b; --fg: #e6e6e2; --dim: #9a9da6; --line: #33363d;
  --card: #1d2025; --good: #3fbf83; --bad: #ee6a5f; --c0: #6ea8f7; --c1: #f2a33c; --c2: #4cc38f; --c3: #ec77b6;
  --c4: #ac92ee; --c5: #4cc4d6; --c6: #cfa063; --c7: #f0796b; --c8: #9fb0c1; --c9: #b3d13c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 36px 24px 60px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 25px; margin: 0 0 12px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 44px 0 10px; } h3 { font-size: 13px; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 6px; color: var(--dim); max-width: 86ch; }
code { font: 13px ui-monospace, "SF Mono", Menlo, monospace; }
table { border-collapse: collapse; width: 100%; margin-top: 18px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: 13px; } th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--dim); font-size: 12px; } td small.up { color: var(--good); }
td small.down { color: var(--bad); } td.best b { border-bottom: 2px solid var(--good); }
.scroll { overflow-x: auto; } .cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; min-width: 0; }
svg { display: block; max-width: 100%; height: auto; } svg.lines { width: 100%; }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim); } svg text.axis { font-size: 11.5px; }
svg .on { fill: var(--bg); } svg .series text { font-size: 12px; font-weight: 600; }
svg .hit { fill: var(--good); } svg .miss { fill: var(--bad); }
svg .share { text-anchor: middle; } svg circle { fill: var(--c0); fill-opacity: .55; }
svg .empty { fill: var(--line); opacity: .3; } svg .grid { stroke: var(--line); fill: none; }
svg.lines:hover .series { opacity: .18; } svg.lines .series:hover { opacity: 1; }
"""


def page(results: Results) -> str:
    """The whole document."""
    rows = rows_of(results.courses)
    noises = list(dict.fromkeys(row.noise for row in rows))
    parts = [f"<p>{escape(sentence)}.</p>" for sentence in about(results)]
    parts.append(f'<div class="scroll">{_table(rows, noises)}</div>')
    for noise in noises:
        courses = [one for one in results.courses if one.noise == noise]
        parts.append(_section(results, courses, [row for row in rows if row.noise == noise], noise))
    title = f"Federated learning on {escape(results.data.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )


def _table(rows: Sequence[Row], noises: Sequence[str]) -> str:
    names = list(dict.fromkeys(called(row) for row in rows))
    by_cell = {(called(row), row.noise): row for row in rows}
    best = {noise: max((r for r in rows if r.noise == noise), key=lambda r: r.accuracy.mean) for noise in noises}
    head = "".join(f"<th>{escape(noise)}</th>" for noise in noises)
    lines = []
    for name in names:
        cells = []
        for noise in noises:
            row = by_cell.get((name, noise))
            if row is None:
                cells.append("<td>–</td>")
                continue
            mark = ' class="best"' if row is best[noise] else ""
            cells.append(f"<td{mark}><b>{percent(row.accuracy)}</b>{_difference(row)}</td>")
        lines.append(f"<tr><td><code>{escape(name)}</code></td>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th>method</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _difference(row: Row) -> str:
    if row.difference is None:
        return "<small>baseline</small>"
    mean, half = row.difference.mean, row.difference.half
    is_sure = half is not None and abs(mean) > half
    mark = f' class="{"up" if mean > 0 else "down"}"' if is_sure else ""
    return f"<small{mark}>{percent(row.difference, signed=True)}</small>"


def _section(results: Results, courses: Sequence[Course], rows: Sequence[Row], noise: str) -> str:
    """All about one noise: curves, numbers, matrices, clients."""
    methods = list(dict.fromkeys(one.method for one in courses))
    runs = {name: [one for one in courses if one.method == name] for name in methods}
    series = [curve(name, runs[name], w) for name in methods for w in range(len(runs[name][0].confusion))]
    parts = [
        f"<h2>Noise <code>{escape(noise)}</code></h2>",
        '<div class="card"><h3>Accuracy on the test, round by round</h3>'
        f"{line_chart(series, x='round', y='accuracy in %')}"
        "<p>Lines: mean over seeds. Bands: from the lowest to the highest. Point at a line to see it alone.</p></div>",
        table([DETAILS, *map(details, rows)]),
    ]
    if results.data.classes <= MOST_SEEN:
        names = list(results.data.names)
        cards = [_card("Labels that clients learn from", heat_map(
            mean_of([one.transition for one in runs[methods[0]]]), names, rows="right class", columns="label given"
        ))]  # fmt: skip
        for name in methods:
            shares = mean_of([_shares(one.confusion[0]) for one in runs[name]])
            cards.append(_card(f"<code>{escape(name)}</code> on the test", heat_map(
                shares, names, rows="right class", columns="named"
            )))  # fmt: skip
            for key in runs[name][0].by_class:
                learnt = mean_of([one.by_class[key] for one in runs[name]])
                cards.append(_card(f"<code>{escape(name)}</code>: {escape(key)}", heat_map(
                    learnt, names, rows="class", columns="class"
                )))  # fmt: skip
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    known = [
        _card(f"<code>{escape(name)}</code>: {escape(key)}", dots(
            [rate for one in runs[name] for rate in one.rates],
            [value for one in runs[name] for value in one.by_client[key]], x="wrong labels of a client", y=key
        ))
        for name in methods for key in runs[name][0].by_client if runs[name][0].rates
    ]  # fmt: skip
    if known:
        parts.append("<p>What the server knows of each client in the end, of all seeds:</p>")
        parts.append(f'<div class="cards">{"".join(known)}</div>')
    return "".join(parts)


def table(lines: Sequence[Sequence[str]]) -> str:
    """A header and lines."""
    header, *rest = lines
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def curve(name: str, runs: Sequence[Course], network: int) -> Series:
    """Accuracy by round over the seeds of a method."""
    values = [[scores[network]["accuracy"] for scores in run.rounds if scores] for run in runs]
    rounds = [i for i, scores in enumerate(runs[0].rounds, 1) if scores]
    each = list(zip(*values, strict=True))
    shown = name if not network else f"{name} (network {network + 1})"
    return Series(shown, rounds, [fmean(of) for of in each], [min(of) for of in each], [max(of) for of in each])


def mean_of(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Of [S, C, C] over S."""
    return [[fmean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _shares(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[count / max(1, sum(row)) for count in row] for row in counts]


def _card(title: str, picture: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{picture}</div>'
