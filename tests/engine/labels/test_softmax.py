"""Softmax over few classes is torch's, and so are its slopes."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.labels.softmax import LANES, log_softmax, softmax


@pytest.mark.parametrize("classes", [1, 2, 10, LANES - 1, LANES, LANES + 1, 100])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_it_is_torch_s(classes, shape):
    logits = 30 * torch.randn(*shape, classes, generator=torch.Generator().manual_seed(0))
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        one, two = (logits.clone().requires_grad_() for _ in range(2))
        weight = torch.arange(1.0, classes + 1)
        got, expected = ours(one), theirs(two, -1)
        assert_close(got, expected)
        slopes = (torch.autograd.grad((value * weight).sum(), leaf)[0] for value, leaf in ((got, one), (expected, two)))
        assert_close(*slopes, rtol=1e-5, atol=1e-4)  # sums of up to 5050


def test_classes_without_a_chance_stay_so():
    logits = torch.tensor([0.0, float("-inf"), 1.0])
    assert_close(softmax(logits), torch.softmax(logits, -1))
    assert_close(log_softmax(logits), torch.log_softmax(logits, -1))
