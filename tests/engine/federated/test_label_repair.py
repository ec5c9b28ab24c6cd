"""Digits half of whose holders have most labels wrong: those are found, and mend their labels."""

import math

import pytest
import torch

from anabranch.federated.digits import load_digits
from anabranch.federated.label_repair import f1, repair
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.maskedoptim import MaskedOptim
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found
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


def run(method, clients, rounds):
    holdings, *truth = noisy_digits(clients)
    return repair(found(method, MLP((64, 64, 10)), holdings, Schedule(rounds=rounds)), *truth)


def test_f1():
    truth = torch.tensor([True, True, False, False, False])
    assert f1(truth, truth) == 1
    assert f1(torch.tensor([True, False, True, False, False]), truth) == 0.5
    assert f1(~truth, truth) == 0
    assert f1(truth & False, truth & False) == 1


def test_noisy_clients_are_found_and_mend_their_labels():
    result = run(MaskedOptim(warmup=5), clients=10, rounds=9)
    assert f1(result.found, torch.arange(10) < 5) == 1
    assert result.before == pytest.approx(0.4, abs=0.01)
    assert result.after > result.before + 0.2  # 0.8 here; ten points are asked for


def test_a_method_that_learns_no_labels_mends_none():
    result = run(FedAvg(), clients=10, rounds=2)
    assert not result.found.any()
    assert math.isnan(result.before)
    assert math.isnan(result.after)
    found_only = run(MaskedOptim(warmup=1, learn=False), clients=10, rounds=2)
    assert found_only.after == found_only.before


@pytest.mark.slow
def test_it_is_worth_a_point_of_accuracy_or_more():
    ours, plain = run(MaskedOptim(warmup=15), clients=20, rounds=40), run(FedAvg(), clients=20, rounds=40)
    assert f1(ours.found, torch.arange(20) < 10) == 1
    assert ours.accuracy > plain.accuracy + 0.01
