"""What tests of federated training share."""

import pytest

from anabranch.federated.method import FedAvg


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
