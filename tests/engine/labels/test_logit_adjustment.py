"""Logit adjustment: shares of what counts, nothing for even shares, finite for absent classes."""

import torch
import torch.nn.functional as F

from anabranch.labels.logit_adjustment import class_counts, log_prior


def test_counts_leave_out_what_does_not_count():
    y = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0]])
    real = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert class_counts(y, real, 4).tolist() == [[1, 0, 2, 0], [2, 2, 0, 0]]


def test_even_shares_change_no_loss():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(50, 5, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    prior = log_prior(torch.full((1, 5), 10))
    torch.testing.assert_close(F.cross_entropy(logits + prior, y), F.cross_entropy(logits, y))


def test_an_absent_class_is_out_of_the_softmax_and_finite():
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5]], requires_grad=True)
    adjusted = logits + log_prior(torch.tensor([[3, 1, 0, 4]]))
    assert adjusted.isfinite().all()
    without = logits[:, [0, 1, 3]] + torch.tensor([3 / 8, 1 / 8, 4 / 8]).log()
    y = torch.tensor([0])
    torch.testing.assert_close(F.cross_entropy(adjusted, y), F.cross_entropy(without, y))
    # a divergence from a distribution that gives the class a share has a finite value and slope
    value = F.kl_div(adjusted.log_softmax(1), torch.full((1, 4), 0.25), reduction="sum")
    (slope,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert slope.isfinite().all()
