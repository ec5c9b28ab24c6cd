"""Coordinate-wise rules: definitions, every instruction set, orders, ties, infinities, refusals."""

import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.coordinate_rules import cpu, reference
from anabranch_kernels.coordinate_rules.op import (
    coordinate_median,
    mean_around_median,
    phocas,
    sign_majority,
    trimmed_mean,
)
from anabranch_kernels.coordinate_rules.reference import Rule
from anabranch_kernels.native import extension

ISAS = extension.supported_isas()
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
INF = math.inf


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def trims(rule, N):
    """The f to try: none, one, the most that the rule allows."""
    if rule in (Rule.MEDIAN, Rule.SIGN_MAJORITY):
        return [0]
    most = N - 1 if rule is Rule.MEAN_AROUND_MEDIAN else (N - 1) // 2
    return sorted({0, min(1, most), N // 4, most})


def every_rule(points, fs=None):
    for rule in Rule:
        for f in trims(rule, points.shape[1]) if fs is None else fs:
            yield rule, f


# ------------------------------------------------------------------------------------------- what they are: one problem


def by_definition(values, rule, f):
    """One coordinate in Python: sorts, keys and fsum; distances as exact as Python's floats."""
    ordered, N = sorted(values), len(values)
    median = (ordered[(N - 1) // 2] + ordered[N // 2]) / 2
    if rule is Rule.SIGN_MAJORITY:
        return float(np.sign(sum(np.sign(values))))
    if rule is Rule.MEDIAN:
        return median
    trimmed = math.fsum(ordered[f : N - f]) / max(1, N - 2 * f)
    if rule is Rule.TRIMMED_MEAN:
        return trimmed
    centre = median if rule is Rule.MEAN_AROUND_MEDIAN else trimmed
    nearest = sorted(ordered, key=lambda value: (abs(value - centre), value))[: N - f]
    return math.fsum(nearest) / (N - f)


@given(st.integers(1, 12), st.integers(0, 2**16), st.sampled_from([1, 3, 1000]))
@settings(max_examples=60)
def test_the_rules_are_their_definitions(N, seed, kinds):
    """Quarters of small whole numbers: many ties, and every distance to a median is exact."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randint(-kinds, kinds + 1, (1, N, 5), generator=random, dtype=torch.int64).to(F64) / 4
    for rule, f in every_rule(points):
        if rule is Rule.PHOCAS and f and kinds < 1000:
            continue  # its centre is rounded, so which of two at one distance is nearer is rounding's choice
        wanted = torch.tensor([[by_definition(points[0, :, d].tolist(), rule, f) for d in range(5)]], dtype=F64)
        for dtype in (F64, torch.float32):
            assert_close(reference.coordinate_rule(points.to(dtype), rule, f), wanted.to(dtype))


@pytest.mark.parametrize("N", [1, 2, 7, 20, 33])
def test_numpy_and_scipy_say_the_same(N):
    points = cloud(2, N, 40, dtype=F64)
    assert_close(coordinate_median(points), torch.from_numpy(np.median(points.numpy(), axis=1)))
    for f in trims(Rule.TRIMMED_MEAN, N):
        # A share that scipy's rounding down brings back to f.
        wanted = scipy.stats.trim_mean(points.numpy(), (f + 0.5) / N, axis=1)
        assert_close(trimmed_mean(points, f), torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_answers(dtype):
    points = torch.tensor([1.0, 5.0, -2.0, 1.5, -0.0, 100.0], dtype=dtype)[None, :, None]
    wanted = {
        (Rule.MEDIAN, 0): 1.25,
        (Rule.TRIMMED_MEAN, 1): 1.875,  # (0 + 1 + 1.5 + 5) / 4
        (Rule.TRIMMED_MEAN, 2): 1.25,
        (Rule.MEAN_AROUND_MEDIAN, 2): 0.125,  # 1.25 +- 0.25, 0, -2, which is nearer than 5
        (Rule.MEAN_AROUND_MEDIAN, 4): 1.25,
        (Rule.MEAN_AROUND_MEDIAN, 5): 1.0,  # of two at the same distance the lower one
        (Rule.PHOCAS, 2): 0.125,
        (Rule.SIGN_MAJORITY, 0): 1.0,
    }
    for (rule, f), answer in wanted.items():
        got = torch.ops.anabranch.coordinate_rule(points, rule, f)
        assert torch.equal(got, torch.tensor([[answer]], dtype=dtype)), rule


def test_bulyan_keeps_theta_less_twice_f():
    """n = 4f + 3 rows, theta = n - 2f selected, the mean of the theta - 2f values around their median."""
    f = 2
    selected = cloud(1, 2 * f + 3, 6, dtype=F64)
    wanted = [by_definition(selected[0, :, d].tolist(), Rule.MEAN_AROUND_MEDIAN, 2 * f) for d in range(6)]
    assert_close(mean_around_median(selected, 2 * f)[0], torch.tensor(wanted, dtype=F64))


# ------------------------------------------------------------------------------------ every instruction set, to the bit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("N", [*range(1, 36), 63, 64, 65, 96, 127, 128, 129, 130, 257])
def test_every_instruction_set_equals_the_reference(isa, N):
    for dtype, D in ((torch.float32, 35), (torch.bfloat16, 33), (torch.float16, 7)):
        points = cloud(2, N, D, seed=N, dtype=dtype)
        points[1] = (points[1] * 2).round()  # ties, and zeros of both signs
        for rule, f in every_rule(points):
            got, wanted = cpu.coordinate_rule(points, rule, f, isa), reference.coordinate_rule(points, rule, f)
            assert torch.equal(got, wanted), (dtype, rule, f)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [0, 1, 15, 511, 512, 513, 16384, 16401, 40000])
def test_any_number_of_columns(isa, D):
    points = cloud(2, 5, D)
    for rule, f in every_rule(points, fs=[1]):
        assert torch.equal(cpu.coordinate_rule(points, rule, f, isa), reference.coordinate_rule(points, rule, f))


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("N", [6, 31, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_the_points_changes_no_bit(N, dtype):
    points = cloud(1, N, 300, dtype=dtype)
    points[:, ::3, ::2] = (points[:, ::3, ::2] * 3).round() * 0.0  # zeros of both signs
    orders = [torch.randperm(N, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for rule, f in every_rule(points, fs=[N // 4]):
        first = cpu.coordinate_rule(points, rule, f)
        for order in orders:
            again = cpu.coordinate_rule(points[:, order], rule, f)
            assert torch.equal(again.view(torch.int16), first.view(torch.int16)), rule


def test_the_number_of_threads_changes_no_bit(threads):
    points = cloud(2, 9, 50_003)
    for rule, f in every_rule(points, fs=[2]):
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(cpu.coordinate_rule(points, rule, f))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[0], reference.coordinate_rule(points, rule, f))


def test_strided_points_give_the_same_bits():
    points = cloud(2, 5, 77)
    wider = torch.full((2, 5, 3, 100), math.nan)
    wider[:, :, 1, 11:88] = points
    for view in (wider[:, :, 1, 11:88], points.transpose(1, 2).contiguous().transpose(1, 2)):
        for rule, f in every_rule(points, fs=[1]):
            assert torch.equal(cpu.coordinate_rule(view, rule, f), cpu.coordinate_rule(points, rule, f))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [3, 5, 6, 40])
def test_equal_points_are_the_result(dtype, N):
    points = cloud(1, 1, 200, dtype=dtype).expand(1, N, 200)
    for apply in (
        coordinate_median, lambda x: trimmed_mean(x, 1), lambda x: mean_around_median(x, 2), lambda x: phocas(x, 1)
    ):  # fmt: skip
        # m times a value over m: exact where float64 holds the sum of so many, one rounding each where it does not.
        assert_close(apply(points), points[:, 0], rtol=N * 2.0**-53 if dtype == F64 else 0, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_a_minority_may_send_anything_but_nan(isa):
    honest, bad = cloud(1, 7, 50), torch.tensor([INF, -INF, 3e38])[None, :, None].expand(1, 3, 50)
    points = torch.cat([bad, honest], 1)
    for rule in (Rule.MEDIAN, Rule.TRIMMED_MEAN, Rule.MEAN_AROUND_MEDIAN, Rule.PHOCAS):
        result = cpu.coordinate_rule(points, rule, 3, isa)
        assert (result >= honest.amin(1)).all()
        assert (result <= honest.amax(1)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_stay_finite_where_the_result_is(isa, dtype):
    highest = torch.finfo(dtype).max
    points = torch.tensor([highest, highest, highest, highest / 2], dtype=dtype)[None, :, None].expand(1, 4, 20)
    for rule, f, wanted in (
        (Rule.MEDIAN, 0, highest), (Rule.TRIMMED_MEAN, 0, highest * 0.875), (Rule.TRIMMED_MEAN, 1, highest),
        (Rule.MEAN_AROUND_MEDIAN, 1, highest),
    ):  # fmt: skip
        got = cpu.coordinate_rule(points, rule, f, isa)
        assert torch.equal(got, torch.full((1, 20), wanted, dtype=dtype)), rule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_infinities_give(dtype):
    def results(*values):
        points = torch.tensor(values, dtype=dtype)[None, :, None].expand(1, len(values), 3)
        rules = coordinate_median(points), trimmed_mean(points, 1), mean_around_median(points, 1), phocas(points, 1)
        assert all((rule == rule[:, :1]).all() or rule.isnan().all() for rule in rules)
        return [rule[0, 0].item() for rule in rules]

    assert results(1, INF, 2, 3) == [2.5, 2.5, 2, 2]
    assert results(1, INF, INF) == [INF, INF, INF, INF]
    assert results(-INF, INF, INF, 1) == [INF, INF, INF, INF]
    assert results(-INF, -INF, 2, -INF) == [-INF] * 4
    assert all(math.isnan(value) for value in results(-INF, INF, INF, -INF))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_nan_is_found_wherever_it_stands(isa, dtype):
    for N, D in ((1, 1), (3, 35), (70, 1100)):
        for row, column in {(0, 0), (N - 1, D - 1), (N // 2, D // 2), (N // 2, max(0, D - 18))}:
            points = cloud(2, N, D, dtype=dtype)
            points[:, :, 0] = INF  # no false alarm, and no hiding place
            points[1, row, column] = -math.nan
            cpu.coordinate_rule(points[:1], Rule.MEDIAN, 0, isa)
            for rule in (Rule.MEDIAN, Rule.SIGN_MAJORITY):
                with pytest.raises(ValueError, match=f"row {row} of problem 1 holds NaN"):
                    cpu.coordinate_rule(points, rule, 0, isa)


def test_a_nan_in_float64_is_refused():
    points = cloud(1, 4, 9, dtype=F64)
    points[0, 2:, 3] = math.nan
    with pytest.raises(ValueError, match=r"row 2 of problem 0 holds NaN \(2 such rows in all\)"):
        coordinate_median(points)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coordinate_median(torch.ones(3, 4)), r"points must be \[B, N, D\].*got \[3, 4\] torch.float32"),
        (lambda: sign_majority(torch.ones(1, 3, 4, dtype=torch.int32)), "torch.int32"),
        (lambda: coordinate_median(torch.ones(1, 0, 4)), r"a rule needs points, got \[1, 0, 4\]"),
        (lambda: trimmed_mean(torch.ones(1, 4, 4), 2), "f must be at least 0 and 2f < N, got f=2, N=4"),
        (lambda: phocas(torch.ones(1, 4, 4), -1), "f must be at least 0 and 2f < N, got f=-1, N=4"),
        (lambda: mean_around_median(torch.ones(1, 4, 4), 4), "f must be at least 0 and f < N, got f=4, N=4"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing(shape):
    assert coordinate_median(torch.ones(shape)).shape == (shape[0], shape[2])


def test_the_registration_is_sound():
    op = torch.ops.anabranch.coordinate_rule.default
    torch.library.opcheck(op, (cloud(2, 5, 7), Rule.PHOCAS, 1))
    compiled = torch.compile(lambda x: trimmed_mean(x, 1) + coordinate_median(x), fullgraph=True, backend="eager")
    points = cloud(2, 5, 7)
    assert_close(compiled(points), trimmed_mean(points, 1) + coordinate_median(points))


@pytest.mark.skipif(sys.platform != "linux", reason="pages that are never touched cost memory elsewhere")
def test_rows_may_start_beyond_two_to_the_31():
    """Offsets are 64 bits: two short rows, 2^31 elements apart, of memory that is mostly never touched."""
    far = torch.empty((1 << 31) + 40, dtype=torch.bfloat16)
    points = far.as_strided((1, 2, 40), (0, 1 << 31, 1))
    points.copy_(cloud(1, 2, 40))
    assert torch.equal(coordinate_median(points), reference.coordinate_rule(points.clone(), Rule.MEDIAN, 0))
