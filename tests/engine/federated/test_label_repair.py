"""Digits half of whose holders have most labels wrong: those are found, and mend their labels."""

import pytest
import torch

from anabranch.federated.digits import load_digits
from anabranch.federated.evaluate import predict
from anabranch.federated.label_repair import Repair, f1, repair
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.joint_optim import JointOptim
from anabranch.federated.methods.maskedoptim import MaskedOptim
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


def noisy_digits(clients):
    """Holdings with 60 % of the labels of every client of the first half replaced, and what those were; test digits."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits(clients, skew=0.0, generator=generator)
    y, n = digits.y.clone(), digits.y.shape[1]
    for row in y[: clients // 2]:
        wrong = torch.randperm(n, generator=generator)[: int(0.6 * n)]
        row[wrong] = (row[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    holdings = Holdings(digits.x.flatten(0, 1), y.flatten(), torch.arange(y.numel()).split(n))
    return holdings, digits.y.flatten(), digits.test_x, digits.test_y


RATES = {clients: torch.where(torch.arange(clients) < clients // 2, 0.6, 0.0) for clients in (10, 20)}


def run(method, clients, rounds):
    """What became of the labels, and the mean accuracy of the last ten rounds."""
    holdings, truth, x, y = noisy_digits(clients)
    federation, accuracies = found(method, MLP((64, 64, 10)), holdings, Schedule(rounds=rounds)), []
    while federation.round < rounds:
        run_round(federation)
        logits = predict(federation.network, federation.server["model"][0], x)
        accuracies.append(float((logits.argmax(1) == y).double().mean()))
    return repair(federation, truth, RATES[clients]), sum(accuracies[-10:]) / len(accuracies[-10:])


def test_f1():
    truth = torch.tensor([True, True, False, False, False])
    assert f1(truth, truth) == 1
    assert f1(torch.tensor([True, False, True, False, False]), truth) == 0.5
    assert f1(~truth, truth) == 0
    assert f1(truth & False, truth & False) == 1


def test_noisy_clients_are_found_and_mend_their_labels():
    result, _ = run(MaskedOptim(warmup=5), clients=10, rounds=9)
    assert result.found == 1
    assert result.before == pytest.approx(0.4, abs=0.01)
    assert result.after > result.before + 0.2  # 0.8 here; ten points are asked for


def test_a_method_that_learns_no_labels_mends_none():
    assert run(FedAvg(), clients=10, rounds=2)[0] == Repair(None, None, None)
    called = run(MaskedOptim(warmup=1, learn=False), clients=10, rounds=2)[0]
    assert called.found == 1
    assert called.after == called.before


def test_labels_that_all_clients_learn_are_counted_where_nobody_is_called_noisy():
    result, _ = run(JointOptim(warm_up=1), clients=10, rounds=3)
    assert result.found is None
    assert result.before == pytest.approx(0.7, abs=0.01)
    assert result.after > result.before


def test_nobody_is_to_be_found_where_all_are_alike():
    holdings, truth, *_ = noisy_digits(10)
    federation = found(MaskedOptim(warmup=5), MLP((64, 64, 10)), holdings, Schedule(rounds=1))
    assert repair(federation, truth, torch.full((10,), 0.3)).found is None


@pytest.mark.slow
def test_it_is_worth_a_point_of_accuracy_or_more():
    (ours, accuracy), (_, plain) = (run(m, clients=20, rounds=40) for m in (MaskedOptim(warmup=15), FedAvg()))
    assert ours.found == 1
    assert accuracy > plain + 0.01
