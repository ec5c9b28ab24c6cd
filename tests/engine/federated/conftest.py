"""What tests of federated training share: a small federation whose clients own 2 to 19 samples, and FedAvg's ways."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anabranch.federated import local
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.layout import Network
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Federation, Holdings, found, run_round
from anabranch.federated.schedule import Schedule

COUNTS = (12, 2, 19, 5)
NETWORK = MLP((6, 7, 3))


def federation(
    method: FedAvg, *, network: Network = NETWORK, shape: tuple[int, ...] = (6,), **schedule: object
) -> Federation:
    generator, M = torch.Generator().manual_seed(1), sum(COUNTS)
    x = torch.randn(M, *shape, generator=generator)
    y = torch.randint(0, 3, (M,), generator=generator)
    options = {"rounds": 10, "batch": 4, "epochs": 2, "lr": 0.05, **schedule}
    return found(method, network, Holdings(x, y, torch.arange(M).split(list(COUNTS))), Schedule(**options))


def model_after(method: FedAvg, rounds: int = 3, **settings: object) -> Tensor:
    made = federation(method, **settings)
    for _ in range(rounds):
        run_round(made)
    return made.server["model"]


@pytest.fixture
def found_small() -> Callable[..., Federation]:
    return federation


@pytest.fixture
def trained() -> Callable[..., Tensor]:
    """The model of a method after some rounds."""
    return model_after


@pytest.fixture
def same_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Check that clients trained one by one make the model that they make all together, for all options given."""

    def check(method: FedAvg, rounds: int = 3, **schedule: object) -> None:
        for drop_last in (False, True):
            together = model_after(method, rounds, drop_last=drop_last, **schedule)
            with monkeypatch.context() as patch:
                patch.setattr(local, "CACHED_NUMBERS", 1)
                alone = model_after(method, rounds, drop_last=drop_last, **schedule)
            torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)

    return check


class BySteps(FedAvg):
    """FedAvg whose epochs no kernel takes whole: it has, to the bit, what methods have whose terms are left out."""

    def loss_of(self, visit, out, batch):
        return FedAvg.loss_of(self, visit, out, batch)


class ByAutograd(FedAvg):
    """FedAvg whose steps no kernel takes, for methods with a loss or a slope that looks at rows."""

    def loss(self, visit, rows, batch):
        return FedAvg.loss(self, visit, rows, batch)


@pytest.fixture
def by_steps():
    return BySteps()


@pytest.fixture
def by_autograd():
    return ByAutograd()
