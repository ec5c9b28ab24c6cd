"""Which options a method takes, and what it says about others."""

from dataclasses import fields

import pytest

from anabranch.aggregate.settings import MIXES, RULES, AggregateMethod, AggregateOptions

SOME = {
    "f": 1, "weights": (1.0, 2.0, 3.0), "tol": 1e-3, "neighbours": 2, "chosen": 2, "radius": 1.0, "steps": 2, "own": 0,
    "root": 1, "confidence": 2.0, "step": 0.1, "bucket": 2, "seed": 3, "clip": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_its_options_and_no_others(rule):
    AggregateMethod(rule=rule, **{name: SOME[name] for name in RULES[rule]})
    needed = {name: SOME[name] for name in RULES[rule]}
    for name in SOME.keys() - set(RULES[rule]):
        with pytest.raises(ValueError, match=rf"{rule} takes .*; got {name} too"):
            AggregateMethod(rule=rule, **needed, **{name: SOME[name]})


@pytest.mark.parametrize("step", MIXES)
def test_a_step_takes_its_options_and_no_others(step):
    AggregateMethod(rule="medoid", pre=(step,), **{name: SOME[name] for name in MIXES[step]})
    assert {field.name for field in fields(AggregateMethod)} == {*SOME, "rule", "pre"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "median"}, "unknown rule 'median'; choose one of"),
        ({"pre": ("nnm", "nnm"), "f": 1}, "each at most once, got"),
        ({"pre": ("clip",)}, r"steps before a rule are \['nnm', 'bucketing'"),
        ({"rule": "krum"}, "krum needs f"),
        ({"rule": "coordinate-median", "f": 1}, "coordinate-median takes no options; got f too"),
        ({"pre": ("nnm",), "rule": "krum"}, "krum after nnm needs f"),
        ({"rule": "trimmed-mean", "f": -1}, "f must be at least 0, got -1"),
        ({"pre": ("bucketing",), "bucket": 2, "weights": (1.0,)}, "leave out weights, own and root"),
        ({"pre": ("bucketing",), "bucket": 2, "rule": "fltrust", "root": 1}, "leave out weights, own and root"),
    ],
)
def test_bad_methods_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AggregateMethod(**options)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (AggregateMethod(weights=(1.0, 2.0)), "weights must be 3 finite numbers"),
        (AggregateMethod(weights=(1.0, -2.0, 3.0)), "not negative"),
        (AggregateMethod(weights=(0.0, 0.0, 0.0)), "some positive"),
        (AggregateMethod(weights=(1.0, float("nan"), 1.0)), "finite"),
        (AggregateMethod(rule="fltrust", root=3), "root must be the index of one of 3 clients, got 3"),
    ],
)
def test_methods_that_do_not_fit_the_clients_are_refused(method, words):
    with pytest.raises(ValueError, match=words):
        method.check(3)


def test_clients_that_are_dropped_count_among_f():
    assert AggregateMethod(rule="krum", f=2).without([1], 6) == AggregateMethod(rule="krum", f=1)
    assert AggregateMethod(rule="fltrust", root=3).without([0, 1], 6) == AggregateMethod(rule="fltrust", root=1)
    assert AggregateMethod(weights=(1.0, 2.0, 3.0)).without([1], 3) == AggregateMethod(weights=(1.0, 3.0))
    with pytest.raises(ValueError, match="2 clients are not finite, and f=1 says that fewer may be bad"):
        AggregateMethod(rule="krum", f=1).without([0, 1], 9)
    with pytest.raises(ValueError, match="root is client 1, which is not finite"):
        AggregateMethod(rule="fltrust", root=1).without([1], 9)
    with pytest.raises(ValueError, match="no client is left"):
        AggregateMethod().without([0, 1], 2)


def test_options_are_checked():
    with pytest.raises(ValueError, match="non_finite must be 'raise' or 'drop', got 'keep'"):
        AggregateOptions(non_finite="keep")
