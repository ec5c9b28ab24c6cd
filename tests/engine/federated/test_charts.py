"""Pictures that are well-formed, inside their frames, and escape what they are given."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated.charts import HEIGHT, WIDTH, Series, dots, heat_map, line_chart


def places(svg, tag):
    for one in svg.iter(tag):
        for pair in one.get("points").split():
            yield tuple(map(float, pair.split(",")))


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=14))
def test_lines_stay_in_their_frame_and_names_apart(values):
    series = [Series(f"<{i}>", range(1, len(one) + 1), one, one, one) for i, one in enumerate(values)]
    svg = ElementTree.fromstring(line_chart(series, x="round", y="%"))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(svg, "polyline"))
    labels = sorted(float(one.find("text").get("y")) for one in svg.iter("g"))
    assert len(labels) == len(values)
    assert all(b - a > 13.8 for a, b in pairwise(labels))


def test_a_chart_has_room_for_the_names_of_many_lines():
    svg = ElementTree.fromstring(
        line_chart([Series(str(i), [1, 2], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]) for i in range(40)], x="", y="")
    )
    height = float(svg.get("viewBox").split()[3])
    labels = [float(one.find("text").get("y")) for one in svg.iter("g")]
    assert 10 < min(labels) < max(labels) < height


def test_a_line_rises_where_its_values_do():
    svg = ElementTree.fromstring(
        line_chart([Series("a", [2, 4, 6], [0.1, 0.5, 0.9], [0.0, 0.4, 0.8], [0.2, 0.6, 1.0])], x="", y="")
    )
    across = [x for x, _ in places(svg, "polyline")]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.1)
    heights = [y for _, y in places(svg, "polyline")]
    assert heights == sorted(heights, reverse=True)
    band = [y for _, y in places(svg, "polygon")]
    assert all(high < middle < low for high, middle, low in zip(band[:3], heights, band[:2:-1], strict=True))


@pytest.mark.parametrize("classes", [2, 10, 25])
def test_a_map_has_a_cell_for_each_pair_that_occurs(classes):
    matrix = [[1.0 if i == j else 0.0 for j in range(classes)] for i in range(classes)]
    svg = ElementTree.fromstring(heat_map(matrix, [f"a&{i}" for i in range(classes)], rows="r", columns="c"))
    assert len(list(svg.iter("rect"))) == classes + 1  # and what lies behind


def test_a_point_for_each_client():
    svg = ElementTree.fromstring(dots([0.0, 0.5], [3.0, 3.0], x="<x>", y="y"))
    assert [float(one.get("cx")) for one in svg.iter("circle")] == sorted(
        float(one.get("cx")) for one in svg.iter("circle")
    )
    assert len(list(svg.iter("circle"))) == 2
