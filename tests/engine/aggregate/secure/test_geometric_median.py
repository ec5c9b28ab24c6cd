"""Secure Weiszfeld steps: bit for bit those of plain integers, near the median, deaf to what is far away."""

from fractions import Fraction

import pytest
import torch

from anabranch.aggregate.rules import geometric_median
from anabranch.aggregate.secure.geometric_median import contribution, run_steps, step
from anabranch_kernels.field_coding.op import FIELDS, FixedPoint
from anabranch_kernels.geometric_median.op import centred_gram


def points(N=9, D=12, seed=1):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(made, x, **settings):
    return run_steps(
        made.server, made.clients, dict(enumerate(x)), made.parameters, centre=torch.zeros(x.shape[1]), **settings
    )


@pytest.mark.parametrize(("field", "bits"), [("babybear", 20), ("goldilocks", 44), ("f50", 40)])
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_bit_for_bit_the_rounds_of_plain_integers(session, field, bits, mode):
    weights = (1, 2, 3, 1, 1, 1, 2, 1, 1)
    fixed = FixedPoint(clip=1.0, fraction_bits=bits)
    made = session(field=FIELDS[field], fixed_point=fixed, mode=mode, weights=weights)
    x = points()
    found = run(made, x, smoothing=0.5, steps=4)
    centre = torch.zeros(12, dtype=torch.float64)
    for _ in range(4):
        rows = [contribution(row, centre, 0.5).tolist() for row in x]
        integers = [[w * round(Fraction(v) * 2**bits) for v in row] for w, row in zip(weights, rows, strict=True)]
        sums = torch.tensor([float(sum(column)) for column in zip(*integers, strict=True)], dtype=torch.float64)
        centre = step(centre, sums / (sum(weights) * 2.0**bits), 0.5)
    assert torch.equal(found, centre)


def cost(x, z):
    return float((x - z).norm(dim=1).sum())


def test_four_steps_come_near_the_median(session):
    made = session(field=FIELDS["goldilocks"], fixed_point=FixedPoint(clip=1.0, fraction_bits=44))
    x = points()
    gram = centred_gram(x[None], x.mean(0)[None])[0]
    best = cost(x, geometric_median(gram) @ x)
    assert best <= cost(x, run(made, x, smoothing=1e-3, steps=4)) < best * 1.001
    assert cost(x, torch.zeros(12)) > best * 1.005  # where it began


def test_two_far_points_of_nine_move_it_little(session):
    fixed = FixedPoint(clip=1.0, fraction_bits=40)
    x = points()
    far = x.clone()
    far[:2] += 1e6
    centres = [run(session(field=FIELDS["goldilocks"], fixed_point=fixed), y, smoothing=0.1, steps=4) for y in (x, far)]
    spread = (x - x.mean(0)).norm(dim=1).mean()
    assert (centres[0] - centres[1]).norm() < spread / 2
    assert (far.mean(0) - x.mean(0)).norm() > 1e5 * spread


def test_what_does_not_fit(session):
    x = points()
    made = session()
    with pytest.raises(ValueError, match="steps must be 1 to 4, got 5"):
        run(made, x, smoothing=1.0, steps=5)
    with pytest.raises(ValueError, match="too small for the distances and the fraction bits"):
        run(made, x * 1e9, smoothing=1.0, steps=1)
    with pytest.raises(ValueError, match=r"a clip of 0\.5"):
        run(session(fixed_point=FixedPoint(clip=0.5, fraction_bits=16)), x, smoothing=1.0)
    with pytest.raises(ValueError, match="a smoothing above 0"):
        contribution(x[0], x[1], 0.0)
    with pytest.raises(ValueError, match="a centre \\[l\\]"):
        contribution(x[0], x[1][:5], 1.0)
