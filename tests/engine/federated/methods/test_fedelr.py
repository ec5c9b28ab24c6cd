"""FedELR: no penalty is FedAvg, and its steps beside the formula sample by sample."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.methods.fedelr import FedELR
from anabranch.federated.rounds import run_round


def test_no_penalty_is_fedavg(trained, by_steps):
    assert torch.equal(trained(FedELR(strength=0.0)), trained(by_steps))


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(FedELR())


def test_a_step_is_the_formula(found_small):
    options = {"batch": 32, "epochs": 1, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.0}
    federation = found_small(FedELR(strength=2.0, momentum=0.6), **options)
    network, held = federation.network, federation.holdings
    early = [torch.zeros(len(owned), 3) for owned in held.owned]
    for _ in range(4):
        model = federation.server["model"][0]
        total = torch.zeros_like(model)
        for k, owned in enumerate(held.owned):
            row = model.clone().requires_grad_()
            views = network.layout.views(row[None])
            hidden = F.relu(held.x[owned] @ views["0.weight"][0] + views["0.bias"][0])
            p = (hidden @ views["1.weight"][0] + views["1.bias"][0]).softmax(-1)
            early[k] = 0.6 * early[k] + 0.4 * p.detach()
            loss = F.nll_loss(p.log(), held.y[owned]) + 2 * (1 - (p * early[k]).sum(-1)).log().mean()
            total += len(owned) * (row.detach() - 0.2 * torch.autograd.grad(loss, row)[0])
        run_round(federation)
        torch.testing.assert_close(federation.server["model"][0], total / len(held.y), atol=1e-5, rtol=1e-5)
        for k, mean in enumerate(early):
            torch.testing.assert_close(federation.kept[k]["early"], mean, atol=1e-5, rtol=1e-5)


def test_settings():
    for wrong in ({"strength": -1.0}, {"momentum": 1.5}):
        with pytest.raises(ValueError, match="strength >= 0 and momentum"):
            FedELR(**wrong)
