"""A federation beside the same mathematics written plainly, and under any split of the work."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.common.threads import torch_threads
from anabranch.federated import local
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.rounds import Holdings, cohort, each, found, run_round
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams


def holdings(counts, *, inputs=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    M = sum(counts)
    x = torch.randn(M, inputs, generator=generator)
    y = torch.randint(0, classes, (M,), generator=generator)
    return Holdings(x, y, torch.arange(M).split(list(counts)))


NETWORK = MLP((6, 5, 3))


def plainly(federation):
    """FedAvg by torch.nn, torch.optim and a loop."""
    f, s = federation, federation.schedule
    clients = cohort(s, len(f.holdings.owned), f.round).tolist()
    total, samples = torch.zeros_like(f.server["model"][0], dtype=torch.float64), 0
    for k in clients:
        mine = f.holdings.owned[k]
        views = f.network.layout.views(f.server["model"])
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        with torch.no_grad():
            for i, layer in enumerate((net[0], net[2])):
                layer.weight.copy_(views[f"{i}.weight"][0].T)
                layer.bias.copy_(views[f"{i}.bias"][0])
        sgd = torch.optim.SGD(net.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
        streams = Streams(s.seed, torch.tensor([k]), f.round)
        for epoch in range(s.epochs):
            order = streams.order(torch.tensor([len(mine)]), len(mine), epoch)[0]
            full = len(mine) // s.batch * s.batch
            for picked in order[: full if s.drop_last and full else None].split(s.batch):
                sgd.zero_grad()
                F.cross_entropy(net(f.holdings.x[mine[picked]]), f.holdings.y[mine[picked]]).backward()
                sgd.step()
        row = torch.cat([p for layer in (net[0], net[2]) for p in (layer.weight.T.flatten(), layer.bias)])
        total += len(mine) * row.detach().double()
        samples += len(mine)
    return (total / samples).float()


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 5),
    epochs=st.integers(1, 3),
    drop_last=st.booleans(),
    share=st.sampled_from([0.3, 1.0]),
)
def test_fedavg_is_what_torch_makes_of_it(counts, batch, epochs, drop_last, share):
    schedule = Schedule(batch=batch, epochs=epochs, drop_last=drop_last, share=share, lr=0.1)
    federation = found(FedAvg(), NETWORK, holdings(counts), schedule)
    for _ in range(2):
        expected = plainly(federation)
        run_round(federation)
        torch.testing.assert_close(federation.server["model"][0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr(local, "CACHED_NUMBERS", 2 * NETWORK.layout.size)  # two groups

    def after(threads):
        federation = found(FedAvg(), NETWORK, holdings([4, 9, 2, 7, 5, 5]), Schedule(batch=3, share=0.7))
        for _ in range(3):
            run_round(federation, threads=threads)
        return federation.server["model"]

    assert torch.equal(after(threads), after(1))


def test_one_at_a_time_or_all_together(monkeypatch):
    def after(numbers):
        monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
        federation = found(FedAvg(), NETWORK, holdings([4, 9, 2, 7]), Schedule(batch=3, epochs=2))
        replies = run_round(federation)
        return federation.server["model"], replies.lengths

    for alone, together in zip(after(1), after(10**6), strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("clients", "most", "size"),
    [(7, 10, 7), (7, 7, 7), (8, 7, 4), (21, 10, 6), (100, 33, 25), (100, 200, 50), (5, 1, 1), (1, 1, 1), (0, 1, 1)],
)
def test_groups_are_even_in_number_and_alike(clients, most, size):
    assert local.group_size(clients, local.CACHED_NUMBERS // most, 1.0) == size
    assert local.group_size(clients, local.CACHED_NUMBERS // most, 2 * local.FLOPS_ALONE) == 1
    assert size <= most


@dataclass(frozen=True, slots=True, kw_only=True)
class Uphill(FedAvg):
    def slope(self, visit, rows, slopes):
        return [-slope for slope in slopes]


def test_a_method_may_turn_the_slope():
    """Up with a step forward is down with a step back."""

    def moved(method, lr):
        network, data = NETWORK, holdings([5, 3])
        federation = found(method, network, data, Schedule(batch=9, epochs=1, momentum=0.0, weight_decay=0.0, lr=lr))
        before = federation.server["model"]
        run_round(federation)
        return federation.server["model"] - before

    torch.testing.assert_close(moved(Uphill(), 0.1), -moved(FedAvg(), 0.1), atol=1e-6, rtol=0)


def test_lengths_are_of_what_is_trained():
    network = ResNet(1, 4, 4, 3, wide=8, blocks=(1, 1, 1, 1), norm="batch")
    x = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    federation = found(FedAvg(), network, Holdings(x, torch.arange(12) % 3, [torch.arange(12)]), Schedule(batch=6))
    before = federation.server["model"]
    replies = run_round(federation)
    apart = (replies.mean - before)[:, : network.layout.trained]
    torch.testing.assert_close(replies.lengths, apart.double().square().sum(1)[None], rtol=1e-5, atol=0)
    assert (replies.mean - before)[:, network.layout.trained :].abs().max() > 1e-3


def test_a_cohort_is_drawn_anew_each_round_and_rises():
    schedule = Schedule(share=0.25)
    drawn = [cohort(schedule, 40, round).tolist() for round in range(20)]
    assert all(clients == sorted(set(clients)) and len(clients) == 10 for clients in drawn)
    assert len({client for clients in drawn for client in clients}) == 40


def test_a_client_without_samples_is_refused():
    x, y, owned = holdings([3, 2])
    with pytest.raises(ValueError, match="at least one sample"):
        found(FedAvg(), NETWORK, Holdings(x, y, [*owned, torch.tensor([], dtype=torch.int64)]), Schedule())


@pytest.mark.parametrize("threads", [1, 2])
def test_all_compute_with_one_thread_until_the_results_are_there(threads):
    before = torch.get_num_threads()
    with torch_threads(3):
        seen = [
            (i, inside, torch.get_num_threads())
            for i, inside in each(lambda _: torch.get_num_threads(), "abc", threads)
        ]
        assert torch.get_num_threads() == 3
    assert seen == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]
    assert torch.get_num_threads() == before
