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
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule

COUNTS = (12, 2, 19, 5)


def model_after(method, network, rounds=3, **settings):
    generator, M = torch.Generator().manual_seed(1), sum(COUNTS)
    x, y = torch.randn(M, 1, 4, 4, generator=generator), torch.randint(0, 3, (M,), generator=generator)
    schedule = Schedule(**{"batch": 4, "epochs": 2, **settings})
    federation = found(method, network, Holdings(x, y, torch.arange(M).split(list(COUNTS))), schedule)
    for _ in range(rounds):
        run_round(federation)
    return federation.server["model"]


@pytest.fixture
def epochs(monkeypatch):
    """Grows with every epoch that the kernel takes."""
    taken, real = [], local.perceptron_sgd
    monkeypatch.setattr(local, "perceptron_sgd", lambda *args, **more: (taken.append(args), real(*args, **more)))
    return taken


@pytest.mark.parametrize("widths", [(16, 3), (16, 7, 3), (16, 9, 5, 3)])
@pytest.mark.parametrize("settings", [{}, {"drop_last": True}, {"momentum": 0.0, "weight_decay": 0.0}, {"batch": 64}])
def test_it_trains_as_the_steps_do(widths, settings, by_steps, epochs):
    whole = model_after(FedAvg(), MLP(widths), **settings)
    assert len(epochs) == 6  # three rounds of one group, two epochs each
    torch.testing.assert_close(whole, model_after(by_steps, MLP(widths), **settings), rtol=1e-5, atol=1e-6)
    assert len(epochs) == 6


def test_networks_beside_each_other_are_each_trained(by_steps, epochs):
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
def test_steps_of_the_kernel_are_those_of_autograd(widths, method, settings, monkeypatch):
    """Of whatever looks at a batch once; its loss is computed by torch, for clients with fewer samples too."""
    network = MLP(widths)
    ways, real = [], local.way_of
    monkeypatch.setattr(local, "way_of", lambda *args: (ways.append(real(*args)), ways[-1])[1])
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
def test_each_takes_the_way_that_fits_it(method, network, way, epochs, monkeypatch):
    ways, real = [], local.way_of
    monkeypatch.setattr(local, "way_of", lambda *args: (ways.append(real(*args)), ways[-1])[1])
    assert model_after(method, network, rounds=1).isfinite().all()
    assert set(ways) == {way}
    assert bool(epochs) == (way is local.whole)


def test_a_slope_that_lies_otherwise_in_memory_is_the_same_slope(monkeypatch):
    """torch's fused step once took slopes of convolutions, whose channels came last, for what they were not."""
    network, real = CNN(1, 4, 4, 3), local.slope_of
    expected = model_after(FedAvg(), network, share=0.25)  # a client alone, whose tensors have slopes of their own
    assert any(not slope.is_contiguous() for slope in seen_slopes(monkeypatch, network))
    monkeypatch.setattr(local, "slope_of", lambda *args: [slope.contiguous() for slope in real(*args)])
    torch.testing.assert_close(model_after(FedAvg(), network, share=0.25), expected, rtol=0, atol=0)


def seen_slopes(monkeypatch, network):
    seen, real = [], local.slope_of
    with monkeypatch.context() as patch:
        patch.setattr(
            local, "slope_of", lambda *args: (seen.extend(real(*args)), seen[-len(network.layout.shapes) :])[1]
        )
        model_after(FedAvg(), network, rounds=1, share=0.25)
    return seen
