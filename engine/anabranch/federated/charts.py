"""Pictures of a report as SVG texts: lines with bands, heat maps, dots. Colours are the page's CSS variables."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from math import ceil, floor
from typing import NamedTuple

COLOURS = 10  # --c0 .. --c9; further series are dashed
LEAST_SEEN = 0.005  # share below which a cell is left empty
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 360, 46, 190, 12, 36
ROOM = 14.0  # a name's, one above the other; a chart of many lines is the taller
FEW = 12  # lines whose bands can be told apart


class Series(NamedTuple):
    """A line and the band around it, a number for each of some rounds, which are counted from 1 and rise."""

    name: str
    rounds: Sequence[int]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def line_chart(series: Sequence[Series], *, x: str, y: str) -> str:
    """Shares in [0, 1] over rounds from 1, in percent; names stand at the lines' ends."""
    rounds = max(one.rounds[-1] for one in series)
    low = floor(10 * min(min(one.low) for one in series)) / 10
    high = max(ceil(10 * max(max(one.high) for one in series)) / 10, low + 0.1)
    height = max(HEIGHT, ceil(ROOM * (len(series) + 1)))
    opacity = 0.15 if len(series) <= FEW else 0.03

    def at(round: float, value: float) -> str:
        across = (round - 1) / max(1, rounds - 1) * (WIDTH - LEFT - RIGHT)
        return f"{LEFT + across:.1f},{TOP + (high - value) / (high - low) * (height - TOP - BOTTOM):.1f}"

    parts = [_grid(low, high, rounds, x, y, height)]
    ends = _apart([float(at(one.rounds[-1], one.middle[-1]).split(",")[1]) for one in series], height)
    for i, (one, end) in enumerate(zip(series, ends, strict=True)):
        colour = f"var(--c{i % COLOURS})"
        dash = ' stroke-dasharray="6 3"' if i >= COLOURS else ""
        band = [at(r, v) for r, v in zip(one.rounds, one.high, strict=True)]
        band += [at(r, v) for r, v in zip(reversed(one.rounds), reversed(one.low), strict=True)]
        line = " ".join(at(r, v) for r, v in zip(one.rounds, one.middle, strict=True))
        last = at(one.rounds[-1], one.middle[-1]).split(",")
        parts.append(
            f'<g class="series"><title>{escape(one.name)}: {one.middle[-1]:.1%} after round {one.rounds[-1]}</title>'
            f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="{opacity}"/>'
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<path d="M{last[0]} {last[1]}L{WIDTH - RIGHT + 10} {end:.1f}" stroke="{colour}" opacity="0.5"/>'
            f'<text x="{WIDTH - RIGHT + 13}" y="{end + 4:.1f}" style="fill:{colour}">'
            f"{escape(_short(one.name, 26))}</text></g>"
        )
    return f'<svg class="lines" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def heat_map(matrix: Sequence[Sequence[float]], names: Sequence[str], *, rows: str, columns: str) -> str:
    """Shares [C, C], each row with sum one; numbers are written where there is room for them."""
    C, shown = len(matrix), len(matrix) <= 20
    cell, top = (26 if shown else 520 / C), 22
    left = 30 + 6.2 * min(10, max(map(len, names))) if shown else 22
    size = C * cell
    parts = [
        f'<text class="axis" x="{left + size / 2:.0f}" y="14" text-anchor="middle">{escape(columns)} →</text>',
        f'<text class="axis" transform="translate(12 {top + size / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"← {escape(rows)}</text>",
        f'<rect x="{left:.1f}" y="{top}" width="{size - 1:.1f}" height="{size - 1:.1f}" class="empty"/>',
    ]
    for i, row in enumerate(matrix):
        if shown:
            y = top + (i + 0.68) * cell
            parts.append(f'<text x="{left - 4}" y="{y:.1f}" text-anchor="end">{escape(_short(names[i], 10))}</text>')
        for j, value in enumerate(row):
            if value < LEAST_SEEN:
                continue
            kind = "hit" if i == j else "miss"
            parts.append(
                f'<rect x="{left + j * cell:.1f}" y="{top + i * cell:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}" class="{kind}" fill-opacity="{min(1.0, 0.06 + 0.94 * value):.2f}">'
                f"<title>{escape(names[i])} → {escape(names[j])}: {value:.1%}</title></rect>"
            )
            if shown:
                style = "share on" if value > 0.55 else "share"
                parts.append(
                    f'<text class="{style}" x="{left + (j + 0.48) * cell:.1f}" y="{top + (i + 0.65) * cell:.1f}">'
                    f"{value * 100:.0f}</text>"
                )
    width, height = left + size + 4, top + size + 4
    return (
        f'<svg class="map" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">{"".join(parts)}</svg>'
    )


def dots(across: Sequence[float], up: Sequence[float], *, x: str, y: str) -> str:
    """A point for each client: shares across, any numbers up."""
    width, height, left, right, top, bottom = 340, 240, 58, 12, 10, 36
    low, high = min(up), max(up)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    most = max(0.1, ceil(10 * max(across)) / 10)
    parts = [
        f'<path class="grid" d="M{left} {top}V{height - bottom}H{width - right}"/>',
        f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x)}</text>",
        f'<text class="axis" transform="translate(12 {(top + height - bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text>',
    ]
    for value, place in ((low, height - bottom), (high, top)):
        parts.append(f'<text x="{left - 5}" y="{place + 4}" text-anchor="end">{value:.3g}</text>')
    for value in (0.0, most):
        cx = left + value / most * (width - left - right)
        parts.append(f'<text x="{cx:.1f}" y="{height - bottom + 14}" text-anchor="middle">{value:.0%}</text>')
    for client, (a, b) in enumerate(zip(across, up, strict=True)):
        cx = left + a / most * (width - left - right)
        cy = top + (high - b) / (high - low) * (height - top - bottom)
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4"><title>client {client}: {a:.1%} wrong, {b:.4g}</title></circle>'
        )
    return f'<svg class="dots" viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg>'


def _grid(low: float, high: float, rounds: int, x: str, y: str, height: int) -> str:
    """Lines at tens of percent, numbers of rounds, and what both are."""
    right, bottom = WIDTH - RIGHT, height - BOTTOM
    parts = []
    tens = round((high - low) * 10)
    for i in range(0, tens + 1, 1 + tens // 7):
        place = bottom - i / tens * (bottom - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{(low + i / 10) * 100:.0f}</text>')
    for each in sorted({1, rounds, *(round(1 + (rounds - 1) * i / 4) for i in (1, 2, 3))}):
        place = LEFT + (each - 1) / max(1, rounds - 1) * (right - LEFT)
        parts.append(f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{each}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + right) / 2}" y="{height - 4}" text-anchor="middle">{escape(x)}</text>'
    )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return "".join(parts)


def _apart(places: Sequence[float], height: int) -> list[float]:
    """Heights of labels near their lines, in the same order, that do not cover each other."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for before, i in pairwise(order):
        moved[i] = max(moved[i], moved[before] + ROOM)
    moved[order[-1]] = min(moved[order[-1]], height - 6)
    for after, i in pairwise(reversed(order)):
        moved[i] = min(moved[i], moved[after] - ROOM)
    return moved


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
