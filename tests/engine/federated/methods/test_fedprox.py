"""FedProx beside the same pull taken by autograd, and without a pull."""

from dataclasses import dataclass

import pytest
import torch

from anabranch.federated.method import FedAvg
from anabranch.federated.methods.fedprox import FedProx


@dataclass(frozen=True, slots=True, kw_only=True)
class ByAutograd(FedAvg):
    mu: float
    squared: bool

    def loss(self, visit, rows, batch):
        apart = rows - visit.received
        if self.squared:
            pull = apart.square().sum(1)
        else:  # torch's norm has a slope of zero at zero
            pull = sum(part.flatten(1).norm(dim=1) for part in visit.network.layout.views(apart).values())
        return FedAvg.loss(self, visit, rows, batch) + self.mu / 2 * pull


@pytest.mark.parametrize("squared", [True, False])
def test_the_pull_is_the_slope_of_the_penalty(trained, squared):
    ours, theirs = trained(FedProx(mu=0.7, squared=squared)), trained(ByAutograd(mu=0.7, squared=squared))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - trained(FedAvg())).abs().max() > 1e-3


@pytest.mark.parametrize("squared", [True, False])
def test_no_pull_is_fedavg(trained, squared, by_autograd):
    assert torch.equal(trained(FedProx(mu=0.0, squared=squared)), trained(by_autograd))


@pytest.mark.parametrize("squared", [True, False])
def test_alone_and_together(same_alone_and_together, squared):
    same_alone_and_together(FedProx(mu=0.5, squared=squared))


def test_a_strong_spring_keeps_clients_near(found_small, trained):
    first = found_small(FedAvg()).server["model"]
    free, held = (trained(method, rounds=1) - first for method in (FedAvg(), FedProx(mu=8.0)))
    assert held.norm() < 0.5 * free.norm()


def test_a_spring_does_not_push():
    with pytest.raises(ValueError, match="mu"):
        FedProx(mu=-1.0)
