"""Weights by distance beside two loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.federated.distance_aware import distance_aware, distance_weights
from anabranch.federated.method import Replies

SIZES = torch.tensor([3, 1, 5])


def plainly(models, noisy, shares):
    parts = [model.split(SIZES.tolist()) for model in models.double()]
    clean = [j for j in range(len(models)) if not noisy[j]]
    d = [
        min(sum(float((a - b).norm()) for a, b in zip(parts[k], parts[j], strict=True)) for j in clean)
        if noisy[k]
        else 0.0
        for k in range(len(models))
    ]
    weights = [float(p) * math.exp(-x / (max(d) or 1)) for p, x in zip(shares, d, strict=True)]
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=2, max_size=7), st.integers(0, 1000))
def test_weights(noisy, seed):
    generator = torch.Generator().manual_seed(seed)
    m, noisy = len(noisy), torch.tensor(noisy)
    counts, models = torch.randint(1, 30, (m,), generator=generator), torch.randn(m, 1, 9, generator=generator)
    shares, base = counts.double() / counts.sum(), torch.randn(1, 9, generator=generator)
    mean = torch.einsum("m,mwd->wd", shares.float(), models)
    replies = Replies(torch.arange(m), counts, models, mean, torch.zeros(m, 1), {})
    new = distance_aware({"model": base, "noisy": noisy, "sizes": SIZES}, replies)
    if noisy.all() or not noisy.any():
        assert torch.equal(new, mean)
        return
    weights = distance_weights(models[:, 0], noisy, SIZES, shares)
    torch.testing.assert_close(weights, plainly(models[:, 0], noisy, shares))
    assert float(weights.sum()) == pytest.approx(1)
    relative = weights[~noisy] / shares[~noisy]
    torch.testing.assert_close(relative, relative[:1].expand_as(relative))  # clean ones stay as they were, among them
    assert float((weights / shares).min() / relative[0]) == pytest.approx(math.exp(-1))  # the farthest of all
    torch.testing.assert_close(new, (weights.float() @ models[:, 0])[None], atol=1e-5, rtol=1e-5)


def test_a_noisy_client_that_is_at_a_clean_ones_place_counts_in_full():
    models = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    models[2] = models[0]
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert torch.equal(distance_weights(models, torch.tensor([False, False, True]), SIZES, shares), shares)
