"""Symmetric cross-entropy: its two ends, and pairs of labels confused on digits."""

from dataclasses import dataclass

import pytest
import torch

from anabranch.federated.digits import load_digits
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.symmetric_ce import SymmetricCE
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(FedAvg):
    alpha: float

    def loss(self, visit, rows, batch):
        return self.alpha * FedAvg.loss(self, visit, rows, batch)


def test_without_its_reverse_it_is_cross_entropy(trained, by_steps):
    assert torch.equal(trained(SymmetricCE(alpha=1.0, beta=0.0)), trained(by_steps))
    torch.testing.assert_close(trained(SymmetricCE(alpha=0.3, beta=0.0)), trained(Scaled(alpha=0.3)), atol=1e-6, rtol=0)


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(SymmetricCE())


def test_weights_are_not_negative():
    with pytest.raises(ValueError, match="alpha and beta"):
        SymmetricCE(beta=-1.0)


def test_digits_whose_labels_are_confused_in_pairs():
    """40 % of the labels are moved down by one; in rounds 5 to 10 9 points lie between the two, 4 are asked for."""
    digits = load_digits(20, skew=0.0, generator=torch.Generator().manual_seed(1))
    y = digits.y.clone()
    wrong = int(0.4 * y.shape[1])
    y[:, :wrong] = (y[:, :wrong] - 1) % 10
    held = Holdings(digits.x.flatten(0, 1), y.flatten(), torch.arange(y.numel()).split(y.shape[1]))
    network = MLP((64, 64, 10))

    def accuracy(method):
        federation = found(method, network, held, Schedule(seed=1))
        right = 0.0
        for round in range(10):
            run_round(federation)
            if round >= 5:
                says = forward(network, federation.server["model"], digits.test_x[None]).logits[0].argmax(1)
                right += (says == digits.test_y).double().mean().item() / 5
        return right

    assert accuracy(SymmetricCE()) > accuracy(FedAvg()) + 0.04
