"""FedCFA: the exact properties of its counterfactuals, and that it is FedAvg without them."""

from dataclasses import replace

import pytest
import torch

from anabranch.federated import local
from anabranch.federated.method import FedAvg, Visit
from anabranch.federated.methods.fedcfa import FedCFA, dependence, exchanged, means_of_groups
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import epoch, pack
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams

COUNTS = (7, 4, 9)


def holdings(shape=(6,)):
    generator = torch.Generator().manual_seed(1)
    M = sum(COUNTS)
    return Holdings(
        torch.randn(M, *shape, generator=generator), torch.randint(0, 3, (M,), generator=generator),
        torch.arange(M).split(list(COUNTS)),
    )  # fmt: skip


def after(method, network, held, rounds=2, **schedule):
    federation = found(method, network, held, Schedule(batch=4, epochs=2, **schedule))
    for _ in range(rounds):
        run_round(federation)
    return federation


NETWORK = MLP((6, 8, 3))


def test_without_counterfactuals_it_is_fedavg_bit_for_bit(by_autograd):
    plain = after(by_autograd, NETWORK, holdings())
    ours = after(FedCFA(weights=(1, 0, 0), decorrelation=0), NETWORK, holdings())
    assert torch.equal(plain.server["model"], ours.server["model"])


@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_alone_or_together(case, monkeypatch):
    network, shape = {"mlp": (NETWORK, (6,)), "cnn": (CNN(2, 6, 6, 3, wide=8, features=5), (2, 6, 6))}[case]

    def run(numbers):
        monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
        return after(FedCFA(group=3), network, holdings(shape)).server

    alone, together = run(1), run(10**7)
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], atol=1e-5, rtol=1e-5)


def one_step(method, rows):
    """The loss of the first batch after a round, and its slope."""
    federation = after(method, NETWORK, holdings(), rounds=1)
    data = pack(*holdings()[:2], [holdings().owned[0]])
    streams = Streams(0, torch.tensor([0]), 1)
    start = federation.server["model"]
    visit = Visit(
        network=NETWORK, schedule=federation.schedule, round=1, clients=torch.tensor([0]), data=data, received=start,
        sent=method.send(federation.server, torch.tensor([0]), 1), kept={}, streams=streams,
    )  # fmt: skip
    leaf = rows.clone().requires_grad_()
    batch = next(epoch(data, streams, 0, size=4, drop_last=False))
    loss = method.loss(visit, leaf, batch)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), NETWORK.layout.views(slope)


def test_counterfactuals_train_the_upper_part_alone():
    rows = after(FedAvg(), NETWORK, holdings(), rounds=1).server["model"]
    _, slope = one_step(FedCFA(decorrelation=0), rows)
    _, plain = one_step(FedCFA(weights=(1, 0, 0), decorrelation=0), rows)
    torch.testing.assert_close(slope["0.weight"], plain["0.weight"], atol=1e-7, rtol=1e-6)
    assert not torch.allclose(slope["1.weight"], plain["1.weight"], atol=1e-3)


def test_nothing_exchanged_leaves_each_loss_that_of_the_samples():
    rows = after(FedAvg(), NETWORK, holdings(), rounds=1).server["model"]
    loss, _ = one_step(FedCFA(replaced=0, weights=(1, 5, 5), decorrelation=0), rows)
    plain, _ = one_step(FedCFA(weights=(1, 0, 0), decorrelation=0), rows)
    torch.testing.assert_close(loss, 11 * plain)


def test_all_or_no_factors_are_exchanged():
    h, other = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    everything = torch.arange(4).expand(2, 3, 4)
    assert torch.equal(exchanged(h, other, everything), other)
    assert torch.equal(exchanged(h, other, everything[..., :0]), h)
    one = exchanged(h, other, everything[..., 1:2])
    assert torch.equal(one[:, :, 1], other[:, :, 1])
    assert torch.equal(one[:, :, 2:], h[:, :, 2:])


def test_dependence():
    weight = torch.full((1, 8), 1 / 8)
    cycles = torch.arange(8) * torch.pi / 4
    orthogonal = torch.stack([cycles.sin(), cycles.cos(), (2 * cycles).sin()], -1)[None]
    assert float(dependence(orthogonal, weight)) == pytest.approx(0, abs=1e-6)
    same = orthogonal[..., :1].repeat(1, 1, 3) * torch.tensor([1.0, -2.0, 3.0]) + 5
    assert float(dependence(same, weight)) == pytest.approx(1, abs=1e-5)
    assert float(dependence(same, weight, squared=False)) == pytest.approx(1, abs=1e-5)
    assert float(dependence(torch.ones(1, 8, 3), weight)) == 0
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.corrcoef(x[0].T).square()
    expected = (expected.sum() - 4) / 12
    assert float(dependence(x, weight)) == pytest.approx(float(expected), abs=1e-5)
    padded = torch.cat([x, 100 * x], 1)
    assert float(dependence(padded, torch.cat([weight, 0 * weight], 1))) == pytest.approx(float(expected), abs=1e-5)


def test_means():
    held = holdings()
    data = pack(held.x, held.y, list(held.owned))
    order = Streams(0, torch.arange(3), 0).order(data.counts, 9, 0)
    found_means = means_of_groups(data, 4, NETWORK, order)
    assert found_means["size"].tolist() == [[4, 3, 0], [4, 0, 0], [4, 4, 1]]
    for i, mine in enumerate(held.owned):  # means times sizes are all there is
        sizes = found_means["size"][i].float()
        counts = torch.bincount(held.y[mine], minlength=3).float()
        torch.testing.assert_close(sizes @ found_means["mean_y"][i], counts)
        torch.testing.assert_close(sizes @ found_means["mean_x"][i], held.x[mine].sum(0), atol=1e-5, rtol=1e-5)
    single = means_of_groups(data, 1, NETWORK, order)
    assert torch.equal(single["mean_x"][1, :4], held.x[held.owned[1]][order[1, :4]])
    assert means_of_groups(data, 99, NETWORK, order)["mean_x"].shape == (3, 1, 6)


def test_words_have_no_mean():
    data = pack(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), [torch.tensor([0, 1])])
    with pytest.raises(ValueError, match="int64 samples do not have"):
        means_of_groups(data, 1, NETWORK, torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    "wrong", [{"weights": (1.0, -1.0, 0.0)}, {"replaced": 1.5}, {"choice": "best"}, {"group": 0}, {"decorrelation": -1}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"need|weights"):
        replace(FedCFA(), **wrong)
