"""What tests of federated training share."""

import pytest

from anabranch.federated.method import FedAvg


class BySteps(FedAvg):
    """FedAvg whose steps no kernel takes: it has, to the bit, what methods have whose terms are left out."""

    def loss(self, visit, rows, batch):
        return FedAvg.loss(self, visit, rows, batch)


@pytest.fixture
def by_steps():
    return BySteps()
