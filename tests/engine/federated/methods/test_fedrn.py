"""FedRN: its warm-up, neighbours by a loop over clients, heads beside torch.optim, and the samples it trains on."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.method import FedAvg
from anabranch.federated.methods import fedrn
from anabranch.federated.methods.fedrn import FedRN, neighbours, noise_sample
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.layout import forward, linear
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.networks.text import Text
from anabranch.federated.packed import epoch, subset, with_samples
from anabranch.federated.rounds import run_round


def test_warm_up_is_fedavg_to_the_bit(trained):
    assert torch.equal(trained(FedRN(warm_up=3)), trained(FedAvg()))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_alone_and_together(same_alone_and_together, count):
    same_alone_and_together(FedRN(warm_up=1, neighbours=count), rounds=3, share=0.8)


def test_if_everything_is_clean_it_is_fedavg_to_the_bit(trained, monkeypatch):
    monkeypatch.setattr(fedrn, "clean_posteriors", lambda losses, real: real.float())
    assert torch.equal(trained(FedRN(warm_up=0)), trained(FedAvg()))


def test_the_server_keeps_what_clients_sent(found_small):
    federation = found_small(FedRN(), share=0.5)
    replies = run_round(federation)
    s, who = federation.server, replies.clients
    assert torch.equal(s["models"][who], replies.models[:, 0])
    assert s["visited"].nonzero()[:, 0].tolist() == who.tolist()
    noise = noise_sample(federation.holdings.x[0], federation.schedule.seed)
    for k in who.tolist():
        mine = federation.holdings.owned[k]
        says = lambda x, k=k: forward(federation.network, s["models"][k : k + 1], x[None]).logits[0]
        right = says(federation.holdings.x[mine]).argmax(1) == federation.holdings.y[mine]
        assert float(s["expertise"][k]) == pytest.approx(float(right.double().mean()))
        torch.testing.assert_close(s["noise"][k], says(noise[None])[0])


def test_neighbours_are_skilled_and_alike():
    generator = torch.Generator().manual_seed(5)
    K, most, alpha = 7, 3, 0.6
    expertise, noise = torch.rand(K, generator=generator), torch.randn(K, 4, generator=generator)
    visited = torch.tensor([True, True, False, True, True, True, False])
    clients = torch.tensor([0, 2, 4])
    noise[2] = 0
    found, trust = neighbours(expertise, noise, visited, clients, most, alpha)
    known = [j for j in range(K) if visited[j]]

    def to_unit(values, value):
        low, high = min(values), max(values)
        return min(max((value - low) / (high - low), 0), 1) if high > low else 1.0

    def score(k, j):
        skill = to_unit(expertise[known].tolist(), float(expertise[j]))
        alike = [float(F.cosine_similarity(noise[k], noise[a], dim=0)) for a in (*known, j)]
        return alpha * skill + (1 - alpha) * (1.0 if j == k else to_unit(alike[:-1], alike[-1]))

    for i, k in enumerate(clients.tolist()):
        expected = sorted((j for j in known if j != k), key=lambda j, k=k: score(k, j), reverse=True)[:most]
        assert found[i].tolist() == expected
        scores = torch.tensor([score(k, j) for j in (k, *expected)])
        torch.testing.assert_close(trust[i], scores / scores.sum())


def test_who_knows_nobody_trusts_itself():
    found, trust = neighbours(torch.rand(3), torch.zeros(3, 2), torch.tensor([False, True, False]),
                              torch.tensor([1]), 5, 0.6)  # fmt: skip
    assert found.shape == (1, 2)
    assert trust.tolist() == [[1, 0, 0]]
    _, alone = neighbours(torch.rand(1), torch.zeros(1, 2), torch.tensor([True]), torch.tensor([0]), 5, 0.6)
    assert alone.tolist() == [[1]]


def test_heads_are_tuned_as_torch_does(found_small):
    class Checked(FedRN):
        checked = 0

        def _tuned(self, visit, rows, clean):
            logits = FedRN._tuned(self, visit, rows, clean)
            Checked.checked += 1
            features, s = visit.review(rows)[1], visit.schedule
            views = visit.network.layout.views(rows)
            for i in range(len(rows)):
                head = torch.nn.Linear(7, 3)
                with torch.no_grad():
                    head.weight.copy_(views["1.weight"][i].T)
                    head.bias.copy_(views["1.bias"][i])
                sgd = torch.optim.SGD(head.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
                chosen = subset(with_samples(visit.data, features), clean)
                for batch in epoch(chosen, visit.streams, s.epochs, size=s.batch, drop_last=s.drop_last):
                    if batch.live[i]:
                        sgd.zero_grad()
                        real = batch.real[i]
                        F.cross_entropy(head(batch.x[i][real]), batch.y[i][real]).backward()
                        sgd.step()
                torch.testing.assert_close(logits[i], head(features[i]).detach(), atol=1e-5, rtol=1e-5)
            return logits

    federation = found_small(Checked(warm_up=1, neighbours=2))
    for _ in range(2):
        run_round(federation)
    assert Checked.checked == 2


def test_clients_train_on_what_is_believed_clean(found_small, monkeypatch):
    said = iter([0.9, 0.2])  # by the own network and by the neighbour's, of every second sample

    def posteriors(losses, real):
        second = torch.arange(losses.shape[1]) % 2 == 1
        return torch.where(second, torch.full_like(losses, next(said)), torch.ones_like(losses)) * real

    seen = []

    class Watched(FedRN):
        def send(self, server, clients, round):
            sent = FedRN.send(self, server, clients, round)
            return {**sent, "trust": torch.tensor([[0.3, 0.7]]).expand(len(clients), 2)} if sent else sent

        def samples(self, visit):
            seen.append((visit.round, FedRN.samples(self, visit), visit.data))
            return seen[-1][1]

    federation = found_small(Watched(warm_up=1))
    run_round(federation)
    monkeypatch.setattr(fedrn, "clean_posteriors", posteriors)
    run_round(federation)
    for round, samples, data in seen:  # 0.3 * 0.9 + 0.7 * 0.2 < 0.5
        expected = (data.counts + 1) // 2 if round else data.counts
        assert torch.equal(samples.counts, expected)
        assert torch.equal(samples.x[:, 1], data.x[:, 2] if round else data.x[:, 1])


def test_a_client_with_nothing_clean_trains_on_everything(trained, monkeypatch):
    monkeypatch.setattr(fedrn, "clean_posteriors", lambda losses, real: torch.zeros_like(losses))
    assert torch.equal(trained(FedRN(warm_up=0)), trained(FedAvg()))


@pytest.mark.parametrize("network", [MLP((4, 3)), CNN(1, 8, 8, 3), ResNet(1, 8, 8, 3), Text(9, 3, width=4)])
def test_the_head_of_every_network_is_its_last_layer(network):
    rows = torch.stack([network.first(torch.Generator().manual_seed(seed)) for seed in range(2)])
    x = {MLP: torch.rand(2, 5, 4), Text: torch.randint(9, (2, 5, 6))}.get(type(network), torch.rand(2, 5, 1, 8, 8))
    out = forward(network, rows, x)
    weight, bias = (network.layout.views(rows)[name] for name in network.layout.head)
    torch.testing.assert_close(linear(out.features, weight, bias), out.logits)


def test_noise_is_one_for_all_and_of_a_samples_kind():
    noise = noise_sample(torch.zeros(3, 8, 8), 1)
    assert noise.shape == (3, 8, 8)
    assert torch.equal(noise, noise_sample(torch.ones(3, 8, 8), 1))
    assert not torch.equal(noise, noise_sample(torch.zeros(3, 8, 8), 2))
    assert noise_sample(torch.tensor([5, 6, 7]), 1).tolist() == [1, 0, 0]


def test_settings_are_checked():
    for wrong in ({"warm_up": -1}, {"neighbours": -1}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match="alpha"):
            FedRN(**wrong)
