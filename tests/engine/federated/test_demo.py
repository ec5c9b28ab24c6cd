"""The demonstration shows what it says: the mean breaks, robust rules do not, and twice the same."""

import pytest
import torch

from anabranch.federated import demo
from anabranch.federated.demo import NOBODY_HOSTILE, Settings


def test_the_mean_breaks_and_robust_rules_do_not():
    for seed in range(2):
        courses = demo.run(Settings(seed=seed))
        last = {name: course.accuracy[-1] for name, course in courses.items()}
        assert last["mean"] < 0.2
        assert last[NOBODY_HOSTILE] > 0.88
        for name in ("geometric median", "NNM + geometric median"):
            assert last[name] > last[NOBODY_HOSTILE] - 0.04


def test_the_same_seed_the_same_bits():
    first, second = (demo.run(Settings(rounds=2, steps=2, seed=5)) for _ in range(2))
    for name, course in first.items():
        assert course.accuracy == second[name].accuracy
        assert course.updates.equal(second[name].updates)
    other = demo.run(Settings(rounds=2, steps=2, seed=6))
    assert other["mean"].accuracy != first["mean"].accuracy


@pytest.mark.parametrize("hostile", range(7))
def test_hostile_clients_are_as_many_of_each_kind_as_possible(hostile):
    kinds = demo.kinds_of_hostile(hostile)
    assert sum(kinds.values()) == hostile
    assert max(kinds.values()) - min(kinds.values()) <= 1
    courses = demo.run(Settings(rounds=1, steps=2, hostile=hostile, clients=15))
    updates = courses["mean"].updates
    assert updates.shape[0] == 15
    honest = updates[: 15 - hostile]
    for i in range(kinds["sign flip"]):
        torch.testing.assert_close(updates[15 - hostile + i], -10 * honest.mean(0))


def test_without_hostile_clients_all_rules_learn():
    courses = demo.run(Settings(hostile=0, rounds=4))
    assert courses["mean"].accuracy == courses[NOBODY_HOSTILE].accuracy
    assert min(course.accuracy[-1] for course in courses.values()) > 0.8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hostile": 10}, "fewer than half of the clients hostile, got 10 of 20"),
        ({"hostile": -1}, "fewer than half"),
        ({"rounds": 0}, "rounds and steps >= 1"),
        ({"lr": 0.0}, "lr > 0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)
