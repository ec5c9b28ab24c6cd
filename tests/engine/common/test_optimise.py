"""The schedule's shape, and what AdamW decays."""

import itertools

import pytest
import torch
from torch import nn

from anabranch.common.optimise import cosine_rate, make_optimiser


def test_the_rate_rises_to_its_peak_and_falls_to_its_share():
    rates = [cosine_rate(step, steps=100, warmup=10, lr=1.0, final_lr=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)


def test_vectors_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    optimiser = make_optimiser(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.99))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()  # no gradient: what moves is decayed
    moved = [not torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True)]
    assert moved == [parameter.ndim == 2 for parameter in model.parameters()]
