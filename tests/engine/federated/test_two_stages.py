"""What clients answer, what the server finds by it, and that the first stage is FedAvg with adjusted logits."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated import local
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round, survey
from anabranch.federated.schedule import Schedule
from anabranch.federated.two_stages import TwoStages

NETWORK = MLP((6, 7, 3))
COUNTS = (40, 7, 23, 60, 31, 12)
NOISY = [1, 4]


def federation(method, **schedule):
    """Three clouds of points; two clients have their classes turned round."""
    generator, M = torch.Generator().manual_seed(1), sum(COUNTS)
    y = torch.randint(0, 3, (M,), generator=generator)
    x = 0.5 * torch.randn(M, 6, generator=generator) + 2 * F.one_hot(y, 6)
    owned = torch.arange(M).split(list(COUNTS))
    for k in NOISY:
        y[owned[k]] = (y[owned[k]] + 1) % 3
    options = {"rounds": 6, "batch": 8, "epochs": 2, "lr": 0.05, **schedule}
    return found(method, NETWORK, Holdings(x, y, owned), Schedule(**options))


def after(federation, rounds):
    for _ in range(rounds):
        run_round(federation)
    return federation.server["model"]


def test_clients_answer_with_a_loss_and_a_count_for_each_class(monkeypatch):
    monkeypatch.setattr("anabranch.federated.method.PIECE", 16)  # several passes
    f = federation(TwoStages())
    answers = survey(f, threads=1)
    assert {name: list(answer.shape) for name, answer in answers.items()} == {"losses": [6, 3], "counts": [6, 3]}
    for k, mine in enumerate(f.holdings.owned):
        x, y = f.holdings.x[mine], f.holdings.y[mine]
        losses = F.cross_entropy(forward(NETWORK, f.server["model"], x[None]).logits[0], y, reduction="none")
        for c in range(3):
            count = int((y == c).sum())
            expected = losses[y == c].sum() / max(1, count)  # zero for a class that a client has none of
            assert int(answers["counts"][k, c]) == count
            torch.testing.assert_close(answers["losses"][k, c], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("numbers", [1, 10**6], ids=["alone", "together"])
@pytest.mark.parametrize("separated", [False, True])
def test_noisy_clients_are_found_once(monkeypatch, numbers, separated):
    monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
    f = federation(TwoStages(warmup=4, covariance="diag", separated=separated))
    after(f, 4)
    assert not f.server["noisy"].any()
    run_round(f)
    assert f.server["noisy"].nonzero().flatten().tolist() == NOISY
    f.server["model"] = torch.zeros_like(f.server["model"])  # all losses would be alike now
    run_round(f)
    assert f.server["noisy"].nonzero().flatten().tolist() == NOISY
    sent = f.method.send(f.server, torch.tensor([0, 4, 5]), 5)
    assert sent["noisy"].tolist() == [False, True, False]


def test_without_adjustment_it_is_fedavg_to_the_bit(by_steps):
    assert torch.equal(after(federation(TwoStages(tau=0.0)), 3), after(federation(by_steps), 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Even(TwoStages):
    def fresh(self, network, data):
        return {"log_prior": torch.full((len(data.y), 3), 1 / 3).log()}


def test_even_shares_adjust_nothing_and_uneven_ones_do():
    plain = after(federation(FedAvg()), 3)
    torch.testing.assert_close(after(federation(Even()), 3), plain, atol=1e-5, rtol=1e-5)
    assert float((after(federation(TwoStages()), 3) - plain).abs().max()) > 1e-3


def test_settings_are_checked():
    for wrong, match in (
        ({"warmup": 0}, "warmup"), ({"tau": -1.0}, "tau"), ({"covariance": "tied"}, "covariance"),
        ({"added": 0.0}, "variances"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            TwoStages(**wrong)
    with pytest.raises(ValueError, match="two at least"):
        TwoStages().first(NETWORK, 1)
