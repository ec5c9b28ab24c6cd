"""Rows of a comparison, by hand."""

from dataclasses import asdict

import pytest

from anabranch.data.sources import read_digits
from anabranch.federated.tree.experiment import TreeCourse, TreeResults
from anabranch.federated.tree.plan import BASE, TreePlan
from anabranch.federated.tree.tables import grid, numbers, rows_of, to_markdown, to_text, traffic

VARIANT = "rectify=off"


def course(variant, seed, roots, wrong=(1, 1, 2)):
    """A root, an edge and two leaves, which are right half as often as the root."""
    rounds = [
        {"round": i, "seconds": 0.5, "accuracy": [root, 0.5, root / 2 - 0.1, root / 2 + 0.1],
         "bytes": {"up": [600, 300], "down": [600, 300]}, "told": [10, 20, 10], "wrong": list(wrong), "moved": 0}
        for i, root in enumerate(roots)
    ]  # fmt: skip
    return TreeCourse(
        variant=variant, noise="clean", seed=seed, heights=[2, 1, 0, 0], sizes=[100, 200, 300], rounds=rounds,
        before=[80, 80], models="", seconds=0.5 * len(rounds),
    )  # fmt: skip


def results(*courses):
    plan = TreePlan(tree=(1, 2), also=(VARIANT,))
    return TreeResults(plan, read_digits(), list(courses), [], False)


def test_rows_are_paired_by_seed_and_say_late_and_early():
    twelve = [0.1] * 2 + [0.3] * 10
    found = results(
        course(BASE, 0, twelve), course(VARIANT, 0, [v + 0.1 for v in twelve]),
        course(BASE, 1, [v + 0.4 for v in twelve]), course(VARIANT, 1, [v + 0.7 for v in twelve], wrong=(0, 4, 0)),
        course(BASE, 2, twelve),  # has no pair
    )  # fmt: skip
    base, other = rows_of(found)
    assert (base.variant, other.variant) == (BASE, VARIANT)
    assert base.root.mean == pytest.approx(0.5)
    assert base.first.mean == pytest.approx((0.1 * 2 + 0.3 * 3) / 5 + 0.2)
    assert base.leaves.mean == pytest.approx(0.25)
    assert base.above.mean == pytest.approx(0.25)
    assert [one.mean for one in base.inner] == [pytest.approx(0.5)]
    assert base.apart is None
    assert [other.apart.mean, other.apart_first.mean] == [pytest.approx(0.2)] * 2
    assert other.apart.half == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t of one degree, times 0.1414 / sqrt 2
    assert base.wrong == (pytest.approx(0.1), pytest.approx(0.1))
    assert base.link_bytes == [600.0, 600.0]
    assert base.before_bytes == [40.0, 80.0]
    assert base.averaging_bytes == 800
    assert base.seconds == 0.5


def test_tables_show_the_rows():
    found = results(course(BASE, 0, [0.5]), course(VARIANT, 0, [0.625]))
    header, base, other = grid(rows_of(found))
    assert header[:5] == ("variant", "root", "difference", "edges", "leaves")
    assert base[1:5] == ("50.0", "–", "50.0", "25.0")
    assert other[1:3] == ("62.5", "+12.5")
    assert traffic(rows_of(found))[1:] == [("0 → 1", "40", "600", "800"), ("1 → 2", "80", "600", "800")]
    assert "62.5" in to_text(found)
    assert to_markdown(found).count("\n| ") == 3 + 3
    assert numbers(found)["runs"][1] == asdict(course(VARIANT, 0, [0.625]))


def test_a_comparison_that_was_stopped_has_no_row_without_a_pair():
    assert rows_of(results(course(BASE, 0, [0.5]))._replace(interrupted=True)) != []
    assert rows_of(results()) == []
    assert rows_of(results(course(BASE, 0, [0.5]), course(VARIANT, 1, [0.5]))) == []
