"""Losses beside their definitions, and the values they are known to have."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.labels.losses import early_learning, reverse_cross_entropy, uniform_prior


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 9), st.integers(0, 99))
def test_the_reverse_is_cross_entropy_with_its_sides_exchanged(C, seed):
    z, y = logits(20, C, seed=seed), torch.arange(20) % C
    q = F.one_hot(y, C).double().clamp(1e-4, 1)
    expected = -(z.softmax(-1).clamp(1e-7, 1) * q.log()).sum(-1)
    reverse = reverse_cross_entropy(F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(reverse, expected, atol=C * 1e-6, rtol=0)  # clamps of 1e-7 times 9.2
    of_label = z.softmax(-1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(reverse, 9.2103 * (1 - of_label), rtol=1e-5, atol=0)


def test_the_reverse_is_bounded():
    z = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    loss = reverse_cross_entropy(F.cross_entropy(z, torch.zeros(2, dtype=torch.int64), reduction="none"))
    assert loss.tolist() == pytest.approx([0.0, 4 * math.log(10)])
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_the_prior_is_least_where_all_classes_are_alike():
    uniform = torch.full((1, 5), 0.2, dtype=torch.float64)
    assert uniform_prior(uniform).item() == pytest.approx(math.log(5))
    other = logits(30, 5).softmax(-1)
    divergence = (0.2 * (0.2 / other).log()).sum(-1)
    torch.testing.assert_close(uniform_prior(other), divergence + math.log(5))
    none = torch.tensor([1.0, 0.0], requires_grad=True)
    assert torch.autograd.grad(uniform_prior(none), none)[0].isfinite().all()


@given(st.integers(0, 99))
def test_early_learning_is_its_formula(seed):
    z, past = logits(6, 4, seed=seed, scale=1.0).requires_grad_(), logits(6, 4, seed=seed + 1).softmax(-1) * 0.9
    penalty, t = early_learning(z, past, 0.7)
    assert not t.requires_grad
    torch.testing.assert_close(t, 0.7 * past + 0.3 * z.detach().softmax(-1))
    expected = (1 - (z.softmax(-1) * t).sum(-1)).log()
    torch.testing.assert_close(penalty, expected)
    ours, theirs = (torch.autograd.grad(loss.sum(), z, retain_graph=True) for loss in (penalty, expected))
    torch.testing.assert_close(ours, theirs)


def test_certain_predictions_that_agree_stay_finite():
    z = torch.tensor([100.0, 0.0, 0.0], requires_grad=True)
    penalty, t = early_learning(z, torch.tensor([1.0, 0.0, 0.0]), 0.7)
    assert penalty.item() == pytest.approx(math.log(1.6e-4), rel=0.01)  # p and t are 1e-4 and 3e-5 * 2 from one
    assert torch.autograd.grad(penalty, z)[0].isfinite().all()
    assert t.sum().item() == pytest.approx(1)
