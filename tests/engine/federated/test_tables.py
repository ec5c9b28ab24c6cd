"""Intervals beside SciPy's, and differences that are paired."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from anabranch.data.labelled import Labelled
from anabranch.federated.experiment import Course, Results
from anabranch.federated.plan import Plan
from anabranch.federated.tables import DETAILS, details, grid, interval, numbers, rows_of, to_markdown, to_text


def course(method, seed, accuracies, noise="clean", networks=1):
    scores = [[{"accuracy": a + w, "f1": a, "loss": 1 - a} for w in range(networks)] for a in accuracies]
    return Course(
        method=method, noise=noise, seed=seed, rounds=scores, confusion=[[[1, 0], [1, 2]]] * networks,
        transition=[[1.0, 0.0], [0.0, 1.0]], rates=[0.0], seconds=seed, spectrum=[[2.0, 2.0, 0.0]] * networks,
    )  # fmt: skip


def test_intervals_are_students():
    values = [0.2, 0.5, 0.3, 0.9]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    found = interval(values)
    assert abs(found.mean - found.half - low) < 1e-12
    assert abs(found.mean + found.half - high) < 1e-12
    assert interval([0.3]).half is None


def test_differences_are_from_the_baseline_and_paired():
    courses = [course("other", seed, [0.3 + 0.1 * seed]) for seed in range(3)]
    courses += [course("fedavg", seed, [0.2 + 0.1 * seed]) for seed in range(3)]
    other, fedavg = rows_of(courses)
    assert (fedavg.method, fedavg.difference) == ("fedavg", None)
    assert other.difference.mean == pytest.approx(0.1)
    assert other.difference.half == pytest.approx(0, abs=1e-12)  # the spread of seeds is in both, and cancels
    assert other.accuracy.half > 0.2


def test_only_seeds_that_all_methods_have_count():
    courses = [course("fedavg", 0, [0.1]), course("fedavg", 1, [0.9]), course("b", 0, [0.2])]
    assert [row.accuracies for row in rows_of(courses)] == [[0.1], [0.2]]
    assert rows_of([]) == []


def test_the_last_ten_rounds_count_and_the_best_is_told():
    (row,) = rows_of([course("fedavg", 0, [1.0, *[0.5] * 10])])
    assert (row.accuracy.mean, row.best, row.f1, row.loss) == (0.5, 1.0, 0.5, 0.5)


def test_rounds_that_were_not_looked_at_count_nowhere():
    run = course("fedavg", 0, [1.0, 0.0, 0.5])
    run.rounds[1] = []
    (row,) = rows_of([run])
    assert (row.accuracy.mean, row.best) == (0.75, 1.0)


def test_the_gap_that_a_method_closes_is_a_share_of_what_the_noise_costs():
    courses = [course("fedavg", seed, [0.9 + 0.01 * seed]) for seed in range(2)]
    courses += [course("b", seed, [0.8]) for seed in range(2)]
    courses += [course("fedavg", seed, [0.5], "pairflip:0.4") for seed in range(2)]
    courses += [course("b", seed, [0.7 + 0.1 * seed], "pairflip:0.4") for seed in range(2)]
    rows = {(row.method, row.noise): row for row in rows_of(courses)}
    closed, apart = rows["b", "pairflip:0.4"].closed, rows["b", "pairflip:0.4"].difference
    assert closed.mean == pytest.approx(0.25 / 0.405)
    assert closed.half == pytest.approx(apart.half / 0.405)
    assert grid(rows_of(courses))[2][2].endswith("; 62%)")
    assert rows["b", "clean"].closed is None
    assert all(row.closed is None for row in rows_of(courses[4:]))  # no clean runs


def test_what_is_known_beside_the_accuracy():
    runs = [replace(course("fedavg", seed, [0.5]), found=found, labels=labels)
            for seed, (found, labels) in enumerate([(1.0, [0.4, 0.8]), (0.5, None)])]  # fmt: skip
    (row,) = rows_of(runs)
    assert (row.rank, row.found, row.labels) == (pytest.approx(2), 0.75, (0.4, 0.8))
    assert dict(zip(DETAILS, details(row), strict=True))["right labels"] == "40.0 -> 80.0"


def test_networks_have_rows_of_their_own():
    first, second = rows_of([course("two", 0, [0.5], networks=2)])
    assert (first.network, second.network, second.difference.mean) == (0, 1, 1.0)


def test_tables_for_people_and_programs():
    data = Labelled(
        name="drawn", kind="vector", x=torch.zeros(2, 1), y=torch.tensor([0, 1]), test_x=torch.zeros(1, 1),
        test_y=torch.tensor([0]), names="ab",
    )  # fmt: skip
    courses = [course("fedavg", 0, [0.5]), course("b", 0, [0.75]), course("fedavg", 0, [0.25], "pairflip:0.4")]
    results = Results(Plan(seeds=2), data, courses, True)
    text = to_text(results)
    assert "fedavg  50.0" in text
    assert "b       75.0 (+25.0)" in text
    assert "go on with --resume" in text
    assert "| b | 75.0 (+25.0) |" in to_markdown(results)
    assert "| b | 75.0 | +25.0 |" in to_markdown(results)
    found = numbers(results)
    assert (found["plan"]["data"], found["interrupted"], len(found["runs"])) == ("drawn", True, 3)
