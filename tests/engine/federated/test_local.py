"""Epochs and steps that a kernel takes, beside the same ones by torch alone."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from anabranch.federated import local
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.methods.fedcfa import FedCFA
from anabranch.federated.methods.fedprox import FedProx
from anabranch.federated.methods.maskedoptim import MaskedOptim
from anabranch.federated.methods.robustfl import RobustFL
from anabranch.federated.methods.symmetric_ce import SymmetricCE
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.mlp import MLP


@pytest.fixture
def model_after(trained):
    """The model of a method and a network for pictures after some rounds."""
    return lambda method, network, rounds=3, **settings: trained(
        method, rounds, network=network, shape=(1, 4, 4), **settings
    )


@pytest.fixture
def ways(monkeypatch):
    """Grows with the way of every visit."""
    taken, real = [], local.way_of
    monkeypatch.setattr(local, "way_of", lambda *args: (taken.append(real(*args)), taken[-1])[1])
    return taken


@pytest.fixture
def epochs(monkeypatch):
    """Grows with every epoch that the kernel takes."""
    taken, real = [], local.perceptron_sgd
    monkeypatch.setattr(local, "perceptron_sgd", lambda *args, **more: (taken.append(args), real(*args, **more)))
    return taken


@pytest.mark.parametrize("widths", [(16, 3), (16, 7, 3), (16, 9, 5, 3)])
@pytest.mark.parametrize("settings", [{}, {"drop_last": True}, {"momentum": 0.0, "weight_decay": 0.0}, {"batch": 64}])
def test_it_trains_as_the_steps_do(widths, settings, model_after, by_steps, epochs):
    whole = model_after(FedAvg(), MLP(widths), **settings)
    assert len(epochs) == 6  # three rounds of one group, two epochs each
    torch.testing.assert_close(whole, model_after(by_steps, MLP(widths), **settings), rtol=1e-5, atol=1e-6)
    assert len(epochs) == 6


def test_networks_beside_each_other_are_each_trained(model_after, by_steps, epochs):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Two(FedAvg):
        networks: ClassVar[int] = 2

    class TwoBySteps(type(by_steps)):
        networks = 2

    network = MLP((16, 7, 3))
    both = model_after(Two(), network)
    assert len(epochs) == 12
    torch.testing.assert_close(both, model_after(TwoBySteps(), network), rtol=1e-5, atol=1e-6)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("widths", [(16, 3), (16, 7, 3)])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (FedAvg(), {"decorrelation": 0.1, "epochs": 1}),  # more of them make much of any rounding, as it does
        (FedAvg(), {"augment": True}),
        (SymmetricCE(), {}),
        (CoTeaching(forget=0.3, ramp=1), {"drop_last": True}),
        (RobustFL(trust=1, pull=0.1), {}),
        (MaskedOptim(warmup=1), {"decorrelation": 0.1}),
    ],
)
def test_steps_of_the_kernel_are_those_of_autograd(widths, method, settings, model_after, ways, monkeypatch):
    """Of whatever looks at a batch once; its loss is computed by torch, for clients with fewer samples too."""
    network = MLP(widths)
    ours = model_after(method, network, **settings)
    assert set(ways) == {local.by_kernel}
    monkeypatch.setattr(local, "way_of", lambda *args: local.by_autograd)
    torch.testing.assert_close(ours, model_after(method, network, **settings), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "network", "way"),
    [
        (FedAvg(), MLP((16, *[3] * 15, 3)), local.whole),
        (SymmetricCE(), MLP((16, 9, 5, 3)), local.by_autograd),  # its latents are not its features
        (FedProx(), MLP((16, 7, 3)), local.by_autograd),
        (FedCFA(), MLP((16, 7, 3)), local.by_autograd),
        (FedAvg(), MLP((16, *[3] * 16, 3)), local.by_autograd),
        (FedAvg(), CNN(1, 4, 4, 3), local.by_autograd),
    ],
)
def test_each_takes_the_way_that_fits_it(method, network, way, model_after, epochs, ways):
    assert model_after(method, network, rounds=1).isfinite().all()
    assert set(ways) == {way}
    assert bool(epochs) == (way is local.whole)


def test_a_slope_that_lies_otherwise_in_memory_is_the_same_slope(model_after, monkeypatch):
    """torch's fused step once took slopes of convolutions, whose channels came last, for what they were not."""
    network, real, seen = CNN(1, 4, 4, 3), local.slope_of, []

    def noted(*args):
        seen.extend(slopes := real(*args))
        return slopes

    monkeypatch.setattr(local, "slope_of", noted)
    expected = model_after(FedAvg(), network, share=0.25)  # a client alone, whose tensors have slopes of their own
    assert any(not slope.is_contiguous() for slope in seen)
    monkeypatch.setattr(local, "slope_of", lambda *args: [slope.contiguous() for slope in real(*args)])
    torch.testing.assert_close(model_after(FedAvg(), network, share=0.25), expected, rtol=0, atol=0)
