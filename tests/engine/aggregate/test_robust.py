"""A round by name: what the settings refuse, what clients that sent nothing usable change, who is called an outlier."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.aggregate import mixes, rules
from anabranch.aggregate.robust import ROOTED, aggregate_updates
from anabranch.aggregate.settings import BY_COORDINATE, RULES, AggregateMethod


def cloud(N=9, D=5, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_to(rule, updates):
    """What the rule asks for beside the updates."""
    root = cloud(1, updates.shape[1], seed=7)[0] if rule in ROOTED else None
    return {"root": root, "history": 2 * updates if rule == "foolsgold" else None}


def method(rule):
    options = {"f": 1, "radius": 1.0, "step": 0.1, "own": 0, "root": 0}
    return AggregateMethod(rule=rule, **{name: value for name, value in options.items() if name in RULES[rule]})


# Bulyan's last choices are between mutual nearest neighbours, those of least diameter between its two ends: there the
# first one wins.
CHOOSES_BETWEEN_EQUALS = ("bulyan-selection", "bulyan", "minimum-diameter")


@given(
    st.sampled_from([rule for rule in RULES if rule not in CHOOSES_BETWEEN_EQUALS]),
    st.integers(0, 2**16),
    st.permutations(range(9)),
)
def test_the_order_of_clients_changes_rounding_only(rule, seed, order):
    updates = cloud(9, 4, seed)
    first = aggregate_updates(updates, method(rule), **given_to(rule, updates))
    second = aggregate_updates(updates[order], method(rule), **given_to(rule, updates[order]))
    assert_close(second.update, first.update, rtol=1e-6, atol=1e-6)  # foolsgold's logarithms magnify roundings
    if rule not in BY_COORDINATE:
        assert_close(second.coefficients, first.coefficients[order], rtol=1e-6, atol=1e-6)


@given(st.sampled_from([rule for rule in RULES if rule not in ROOTED]), st.integers(0, 2**16))
def test_the_outcome_is_one_thing(rule, seed):
    updates = cloud(9, 4, seed)
    outcome = aggregate_updates(updates, method(rule), **given_to(rule, updates))
    if rule in BY_COORDINATE or rule == "bulyan":
        assert outcome.coefficients is None
    else:
        assert_close(outcome.coefficients @ updates, outcome.update)
    assert_close(outcome.distances, (updates - outcome.update).norm(dim=1), rtol=1e-6, atol=1e-7)
    assert (outcome.gap_rel is not None) == (rule == "geometric-median")


def test_clients_without_a_usable_update_are_among_the_hostile():
    updates = cloud(9)
    for left_out, f in ((0, 3), (1, 2), (5, 0)):
        outcome = aggregate_updates(updates, AggregateMethod(rule="multi-krum", f=3), left_out=left_out)
        assert_close(outcome.coefficients, rules.multi_krum(updates @ updates.T, f))


def test_rounds_draw_their_own_buckets():
    updates, how = cloud(), AggregateMethod(rule="medoid", pre=("bucketing",), bucket=3, seed=4)
    drawn = [aggregate_updates(updates, how, round=round).coefficients.tolist() for round in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3]
    assert len({tuple(a) for a in drawn}) == 3


@pytest.mark.parametrize("mix", ["nnm", "bucketing", "adaptive-clipping"])
def test_rules_of_coordinates_see_mixed_updates(mix):
    updates = cloud(9)
    rows = {
        "nnm": lambda gram: mixes.nearest_neighbour_mixing(gram, 1),
        "bucketing": lambda gram: mixes.bucketing(gram, 2, torch.Generator().manual_seed(0)),
        "adaptive-clipping": lambda gram: mixes.adaptive_clipping(gram, 1),
    }[mix](updates @ updates.T)
    mixed = (rows @ updates).sort(0).values
    bucket = 2 if mix == "bucketing" else None
    outcome = aggregate_updates(updates, AggregateMethod(rule="trimmed-mean", pre=(mix,), f=1, bucket=bucket))
    assert_close(outcome.update, mixed[1:-1].mean(0))


def test_weights_are_the_clients_only_where_asked_for():
    updates, weights = cloud(), torch.arange(1.0, 10.0)
    plain = aggregate_updates(updates, AggregateMethod(rule="mean"))
    weighted = aggregate_updates(updates, AggregateMethod(rule="mean"), weights=weights.tolist())
    assert_close(plain.update, updates.mean(0))
    assert_close(weighted.update, weights.double() @ updates / 45)


def test_outliers_are_far_from_the_result():
    updates = cloud(12, 400)
    assert not aggregate_updates(updates, AggregateMethod()).outliers.any()
    updates[3] += 5
    updates[7] *= 1e30
    assert aggregate_updates(updates, AggregateMethod()).outliers.nonzero()[:, 0].tolist() == [3, 7]
    assert not aggregate_updates(updates[:1].expand(5, -1), AggregateMethod()).outliers.any()


@pytest.mark.parametrize(
    ("rule", "more", "words"),
    [
        ("foolsgold", {}, "needs history"),
        ("fltrust", {}, "needs root"),
        ("mean", {"root": cloud(1)[0]}, "takes no root"),
        ("krum", {"weights": [1.0]}, "krum takes no weights"),
        ("krum", {}, "2f < N, got f=1, N=1"),
    ],
)
def test_what_a_rule_needs_is_named(rule, more, words):
    with pytest.raises(ValueError, match=words):
        aggregate_updates(cloud(1), method(rule), **more)


def test_no_updates_no_aggregate():
    with pytest.raises(ValueError, match=r"\[N, D\] with N > 0, got \[0, 5\]"):
        aggregate_updates(cloud(0), AggregateMethod())
