"""The sorting kernel equals the reference; without a GPU it runs interpreted."""

import math

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")
from anabranch_kernels.coordinate_rules import gpu, reference
from anabranch_kernels.coordinate_rules.reference import Rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def trims(rule, N):
    """None, a quarter, the most that the rule allows."""
    if rule in (Rule.MEDIAN, Rule.SIGN_MAJORITY):
        return [0]
    return sorted({0, N // 4, N - 1 if rule is Rule.MEAN_AROUND_MEDIAN else (N - 1) // 2})


@pytest.mark.parametrize(
    ("N", "dtype"), [*((N, torch.float32) for N in (1, 2, 3, 8, 13, 64, 65)), *((8, dtype) for dtype in DTYPES[1:])],
    ids=str,
)  # fmt: skip
def test_every_rule_equals_the_reference(N, dtype):
    points = cloud(2, N, 133, seed=N, dtype=dtype)
    points[1] = (points[1] * 2).round()  # ties, and zeros of both signs
    # Interpreted, Triton cuts off what a GPU rounds to bfloat16.
    rtol = 2.0**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    for rule in Rule:
        for f in trims(rule, N)[-1:] if N > 13 else trims(rule, N):
            wanted = reference.coordinate_rule(points, rule, f)
            assert_close(gpu.coordinate_rule(points, rule, f), wanted, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("D", [0, 1, 128, 300])
def test_any_number_of_columns_with_strides(D):
    points = cloud(3, 4, 2 * D)[:, :, ::2]
    assert torch.equal(gpu.coordinate_rule(points, Rule.MEDIAN, 0), reference.coordinate_rule(points, Rule.MEDIAN, 0))
    wider = cloud(2, 9, D)[:, ::3]
    assert torch.equal(gpu.coordinate_rule(wider, Rule.PHOCAS, 1), reference.coordinate_rule(wider, Rule.PHOCAS, 1))


def test_infinities_are_numbers():
    inf = math.inf
    columns = [[1, inf, 2, 3], [1, inf, inf, -1], [-inf, inf, inf, 1], [-inf, -inf, 2, -inf], [-inf, inf, inf, -inf]]
    points = torch.tensor(columns, device=DEVICE).T[None].contiguous()
    for rule in Rule:
        f = trims(rule, 4)[-1]
        got, wanted = gpu.coordinate_rule(points, rule, f), reference.coordinate_rule(points, rule, f)
        assert_close(got, wanted, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("rule", [Rule.MEDIAN, Rule.SIGN_MAJORITY])
def test_a_nan_is_refused(rule):
    points = cloud(2, 6, 300)
    points[:, :, 0] = math.inf
    gpu.coordinate_rule(points, rule, 0)
    points[1, 4, 299] = math.nan
    with pytest.raises(ValueError, match="row 4 of problem 1 holds NaN"):
        gpu.coordinate_rule(points, rule, 0)
