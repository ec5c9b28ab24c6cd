"""Decisions from Gram matrices beside the same done to the points themselves."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from anabranch.aggregate import mixes, rules
from anabranch.aggregate.method import decide, finish_of, try_out
from anabranch.aggregate.settings import RULES, AggregateMethod

NEEDED = {"f": 1, "radius": 2.0, "own": 4, "root": 3, "bucket": 2, "clip": 3.0}


def method_of(rule, pre=()):
    taken = {*RULES[rule], *(["f"] if "nnm" in pre else [])}
    return AggregateMethod(rule=rule, pre=pre, **{name: NEEDED[name] for name in taken if name in NEEDED})


def cloud(N=9, D=30, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


EXPECTED = {
    "mean": rules.mean,
    "geometric-median": rules.geometric_median,
    "medoid": rules.medoid,
    "krum": partial(rules.krum, f=1),
    "multi-krum": partial(rules.multi_krum, f=1),
    "distance-trimmed-mean": partial(rules.distance_trimmed_mean, f=1),
    "bulyan-selection": partial(rules.bulyan_selection, f=1),
    "minimum-diameter": partial(rules.minimum_diameter, f=1),
    "smea": partial(rules.smea, f=1),
    "covariance-filter": partial(rules.covariance_filter, f=1),
    "nearest-neighbours": partial(rules.nearest_neighbours_of, f=1, own=4),
    "fltrust": partial(rules.fltrust, root=3),
    "foolsgold": rules.foolsgold,
}


@pytest.mark.parametrize("pre", [(), ("nnm",)])
@pytest.mark.parametrize("rule", EXPECTED)
def test_a_decision_is_the_rule_after_the_steps(rule, pre):
    gram = cloud() @ cloud().T
    expected = EXPECTED[rule]
    if pre:
        expected = rules.after(partial(mixes.nearest_neighbour_mixing, f=1), expected)
    decision = decide(method_of(rule, pre), gram, resolution=2.0**-52)
    assert_close(decision.rows[0], expected(gram))
    assert finish_of(method_of(rule, pre)) is None


def test_centred_clipping_starts_at_the_base():
    points = cloud()
    rows = decide(AggregateMethod(rule="centred-clipping", radius=2.0, steps=3), points @ points.T, resolution=0.0).rows
    v = torch.zeros(points.shape[1], dtype=points.dtype)
    for _ in range(3):
        apart = points - v
        v = v + (apart * (2 / apart.norm(dim=1, keepdim=True).clamp_min(2))).mean(0)
    assert_close(rows[0] @ points, v)


def test_steps_follow_one_another():
    points = cloud()
    method = AggregateMethod(rule="coordinate-median", pre=("static-clipping", "bucketing"), clip=3.0, bucket=2, seed=5)
    rows = decide(method, points @ points.T, resolution=0.0).rows
    clipped = mixes.static_clipping(points @ points.T, 3.0) @ points
    buckets = mixes.bucketing(points @ points.T, 2, torch.Generator().manual_seed(5))
    assert_close(rows @ points, buckets @ clipped)


def test_bulyan_selects_rows_for_a_rule_of_coordinates():
    points = cloud()
    decision = decide(AggregateMethod(rule="bulyan", f=1), points @ points.T, resolution=0.0)
    selected = rules.bulyan_selection(points @ points.T, 1) > 0
    assert torch.equal(decision.rows, torch.eye(9, dtype=torch.float64)[selected])
    assert finish_of(AggregateMethod(rule="bulyan", f=1)) is not None


def test_a_median_carries_its_bound():
    points = cloud()
    decision = decide(AggregateMethod(weights=(1.0,) * 8 + (100.0,)), points @ points.T, resolution=0.0)
    assert (decision.status, decision.gap) == ("anchor", 0.0)
    assert decision.rows[0].tolist() == [0.0] * 8 + [1.0]


def test_a_median_that_is_not_reached_is_refused(monkeypatch):
    """Whatever the points, Newton's steps end far below any sensible tol; so the solver is told to fail."""

    def fail(*args, **kwargs):
        raise RuntimeError("no geometric median within 1e-300: the bound is 1.0e-15")

    monkeypatch.setattr(rules, "solve_median", fail)
    with pytest.raises(ValueError, match=r"the bound is 1.0e-15; a larger tol accepts it"):
        decide(AggregateMethod(tol=1e-300), torch.eye(3, dtype=torch.float64), resolution=0.0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (AggregateMethod(rule="krum", f=5), "2f < N, got f=5, N=9"),
        (AggregateMethod(rule="bulyan", f=2), r"N >= 4f \+ 3"),
        (AggregateMethod(rule="trimmed-mean", f=5), "2f < N, got f=5, N=9"),
        (AggregateMethod(rule="trimmed-mean", pre=("bucketing",), bucket=3, f=2), "2f < N, got f=2, N=3"),
        (AggregateMethod(pre=("bucketing",), bucket=0), "size=0"),
    ],
)
def test_options_are_tried_before_anything_is_read(method, words):
    with pytest.raises(ValueError, match=words):
        try_out(method, 9)


@pytest.mark.parametrize("M", [1, 2, 5, 8])
def test_a_lower_median_is_torchs(M):
    points = cloud(M, 40).float()
    points[:, 0] = torch.inf
    finish = finish_of(AggregateMethod(rule="lower-median"))
    assert torch.equal(finish(points[None])[0], points.median(0).values)
