"""The secure sum is the plain one, in Python's integers, for any number of clients."""

from fractions import Fraction

import pytest
import torch

from anabranch.federated.private import aggregate_privately


@pytest.mark.parametrize("N", [3, 7, 20])
def test_the_secure_sum_is_the_plain_one(N):
    random = torch.Generator().manual_seed(N)
    updates = torch.randn(N, 33, generator=random)
    updates[0, 0] = 1e30
    coefficients = torch.rand(N, generator=random, dtype=torch.float64)
    private = aggregate_privately(updates, coefficients)
    assert private.is_exact
    assert (private.accepted, private.clipped) == (tuple(range(N)), 1)
    step = coefficients.max() / 64
    assert private.weights == tuple(max(1, round((c / step).item())) for c in coefficients)
    for d in range(33):
        whole = [round(Fraction(min(max(x, -8.0), 8.0)) * 2**16) for x in updates[:, d].tolist()]
        wanted = Fraction(sum(w * q for w, q in zip(private.weights, whole, strict=True)), sum(private.weights) * 2**16)
        assert private.update[d].item() == float(wanted)


def test_two_clients_cannot_hide_from_each_other():
    with pytest.raises(ValueError, match="N"):
        aggregate_privately(torch.zeros(2, 5), torch.ones(2).double())
