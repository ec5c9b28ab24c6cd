"""Turns are fair, disagreement stops a measurement, shares of the roof are what the definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.bench.timing import Case, Contender, Roofs, Sample, best_flops, check_agreement, interleave, measure


def contender(name, value, *, tolerance=0.02, read_bytes=1000, flops=10):
    return Contender(name=name, step=lambda: value, read_bytes=read_bytes, flops=flops, tolerance=tolerance)


def sample(seconds, *, read_bytes=1000, flops=10, read_roof=1e6, flops_roof=1e6):
    return Sample(
        case="c", contender="a", seconds=seconds, read_bytes=read_bytes, flops=flops, read_roof=read_roof,
        flops_roof=flops_roof,
    )  # fmt: skip


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_everyone_runs_equally_often_and_rounds_alternate_in_order(count, repeats, warmup):
    calls = []
    runs = [lambda i=i: calls.append(i) or (i, len(calls)) for i in range(count)]
    results = interleave(runs, repeats=repeats, warmup=warmup)
    rounds = [calls[start : start + count] for start in range(0, len(calls), count)]
    assert rounds == [list(range(count))[:: 1 if turn % 2 == 0 else -1] for turn in range(warmup + repeats)]
    assert [len(one) for one in results] == [repeats] * count
    assert all(owner == i and when > warmup * count for i, one in enumerate(results) for owner, when in one)


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"repeats": 1, "warmup": -1}])
def test_counts_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="repeats >= 1 and warmup >= 0"):
        interleave([lambda: None], **arguments)
    with pytest.raises(ValueError, match="got 0 runs"):
        interleave([], repeats=1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.tensor([1.0, 2.1]), "second is 4.47e-02 from first, allowed 2e-02"),
        (torch.tensor([1.0, float("nan")]), "second is nan from first"),
        (torch.ones(3), r"second returns \[3\], first \[2\]"),
    ],
    ids=["far", "nan", "shape"],
)
def test_a_contender_that_computes_something_else_is_named(other, message):
    case = Case(name="c", contenders=(contender("first", torch.tensor([1.0, 2.0])), contender("second", other)))
    with pytest.raises(ValueError, match=message):
        check_agreement(case)


def test_times_and_work_are_given_for_one_call():
    contenders = (contender("a", torch.ones(1)), contender("b", torch.ones(1), read_bytes=4000, flops=40))
    case = Case(name="c", calls=4, contenders=contenders)
    roofs = iter([9.0, 9.0, 1.0, 3.0, 2.0])  # the first two are warm-up
    first, second = measure(case, Roofs(read=lambda: next(roofs), flops=5.0), repeats=3)
    assert (first.contender, first.read_bytes, first.flops) == ("a", 250, 2)
    assert (second.contender, second.read_bytes, second.flops) == ("b", 1000, 10)
    assert first.read_roof == second.read_roof == 2.0
    assert len(first.seconds) == 3
    assert min(first.seconds) > 0


def test_the_nearer_roof_decides():
    assert sample((0.002,)).roof_share == pytest.approx(0.5)  # 1 ms of reading, 2 ms taken
    assert sample((0.002,), flops=2000).roof_share == pytest.approx(1.0)  # 2 ms of arithmetic
    assert sample((0.001, 0.002, 1.0)).median_s == 0.002


def test_a_matrix_product_has_a_speed():
    assert best_flops(size=32, repeats=1) > 1e6
