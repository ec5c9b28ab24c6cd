"""Gradients cut as torch.nn.utils cuts them, client by client."""

import pytest
import torch

from anabranch.federated.method import FedAvg
from anabranch.federated.methods.clipping import Clipping
from anabranch.federated.networks.mlp import MLP


@pytest.mark.parametrize("limit", [1e-3, 0.5, 5.0])
def test_torch_cuts_likewise(limit):
    network = MLP((6, 7, 3))
    slope = torch.randn(5, network.layout.size, generator=torch.Generator().manual_seed(0))
    slope *= torch.tensor([1e-4, 0.01, 0.1, 1.0, 100.0])[:, None]
    expected = slope.clone()
    for row in expected:
        leaf = torch.nn.Parameter(torch.zeros_like(row))
        leaf.grad = row  # is cut in place
        torch.nn.utils.clip_grad_norm_([leaf], limit)
    whole, *parts = (network.layout.cut(x, count) for x, count in ((slope, 1), (slope, 9), (expected, 9)))
    (cut,) = Clipping(limit=limit).slope(None, slope, whole)
    torch.testing.assert_close(cut, expected)
    torch.testing.assert_close(Clipping(limit=limit).slope(None, slope, parts[0]), parts[1])  # tensor by tensor


def test_a_limit_that_nothing_reaches_is_fedavg(trained, by_autograd):
    assert torch.equal(trained(Clipping(limit=1e6)), trained(by_autograd))


def test_no_step_is_longer_than_the_limit_allows(found_small, trained):
    first = found_small(FedAvg()).server["model"]
    options = {"rounds": 1, "momentum": 0.0, "weight_decay": 0.0, "epochs": 1}
    moved = (trained(Clipping(limit=0.01), **options) - first).norm()
    assert moved <= 0.05 * 0.01 * 5 * 1.001  # at most five steps of a client
    assert moved < 0.1 * (trained(FedAvg(), **options) - first).norm()


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(Clipping(limit=0.3))


def test_the_limit_is_positive():
    with pytest.raises(ValueError, match="limit"):
        Clipping(limit=0.0)
