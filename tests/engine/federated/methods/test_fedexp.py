"""The server's step of FedExP, from replies written down and from rounds."""

import pytest
import torch

from anabranch.federated.method import FedAvg, Replies
from anabranch.federated.methods.fedexp import FedExP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.rounds import run_round


def step(updates, counts, *, trained=None, eps=1e-9):
    """How far [W, D] the server goes from ones, updates [m, W, D] of clients that own counts [m]."""
    m, W, D = updates.shape
    trained, counts, base = D if trained is None else trained, torch.tensor(counts), torch.ones(W, D)
    mean = base + torch.einsum("m,mwd->wd", counts / counts.sum(), updates)
    lengths = updates[:, :, :trained].double().square().sum(2)
    replies = Replies(torch.arange(m), counts, None, mean, lengths, {})
    server = {"model": base, "trained": torch.tensor(trained)}
    return FedExP(eps=eps).aggregate(server, replies, 0)["model"] - base


def test_clients_that_agree_are_averaged():
    updates = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(0)).expand(4, 1, 9)
    torch.testing.assert_close(step(updates, [3, 1, 4, 1]), updates[0])


@pytest.mark.parametrize("m", [2, 3, 8])
def test_orthogonal_clients_go_half_as_far_as_they_are_many(m):
    updates = 2 * torch.eye(m)[:, None]
    torch.testing.assert_close(step(updates, [5] * m), max(1, m / 2) * updates.mean(0))


def test_clients_weigh_what_they_own_and_networks_have_steps_of_their_own():
    apart = torch.diag(torch.tensor([3.0, 4.0, 5.0]))
    alike = torch.tensor([1.0, 2.0, 3.0]).expand(3, 3)
    mean = torch.tensor([0.5 * 3, 0.25 * 4, 0.25 * 5])
    eta = (0.5 * 9 + 0.25 * 16 + 0.25 * 25) / (2 * mean.square().sum())
    assert eta > 1.5
    torch.testing.assert_close(step(torch.stack([apart, alike], 1), [4, 2, 2]), torch.stack([eta * mean, alike[0]]))


def test_no_update_at_all_is_no_step():
    assert torch.equal(step(torch.zeros(3, 1, 4), [1, 1, 1], eps=1e-3), torch.zeros(1, 4))


def test_statistics_are_averaged():
    updates = torch.eye(8)[:, None]
    moved = step(updates, [1] * 8, trained=5)
    torch.testing.assert_close(moved[0], torch.tensor([4 / 8] * 5 + [1 / 8] * 3))  # 5/8 / (2 * 5/64) = 4


def test_a_round_goes_along_the_mean_of_fedavg(found_small, trained):
    first, mean = found_small(FedAvg()).server["model"], trained(FedAvg(), rounds=1)
    federation = found_small(FedExP(eps=1e-6), epochs=8, lr=0.2)
    replies = run_round(federation)
    apart = replies.mean.double() - first.double()
    eta = max(1.0, float(replies.weights @ replies.lengths[:, 0] / (2 * (apart.square().sum() + 1e-6))))
    assert eta > 1.05
    torch.testing.assert_close(federation.server["model"], (first + eta * apart).float())
    assert not torch.equal(mean, first)


def test_what_is_trained_is_known():
    network = ResNet(1, 4, 4, 3, wide=8, blocks=(1, 1, 1, 1), norm="batch")
    assert int(FedExP().first(network, 3)["trained"]) == network.layout.trained < network.layout.size


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(FedExP())


def test_eps_is_positive():
    with pytest.raises(ValueError, match="eps"):
        FedExP(eps=0.0)
