"""A robust rule where a method takes the mean of its models."""

from dataclasses import replace

import pytest
import torch

from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.methods.fedexp import FedExP
from anabranch.federated.methods.fednoro import FedNoRo
from anabranch.federated.methods.robust import Robust
from anabranch.federated.methods.robustfl import RobustFL
from anabranch.federated.methods.symmetric_ce import SymmetricCE
from anabranch.federated.robust_mean import conclude
from anabranch.federated.rounds import run_round

MEDIAN = AggregateMethod(rule="coordinate-median")


@pytest.mark.parametrize(
    "rule",
    [
        AggregateMethod(),  # weighted by samples
        MEDIAN,
        AggregateMethod(rule="trimmed-mean", f=1, pre=("nnm",)),
        AggregateMethod(rule="coordinate-median", pre=("bucketing",), bucket=2, seed=3),  # drawn anew in each round
        AggregateMethod(rule="fltrust", root=2),  # a client by its number
    ],
)
def test_under_fedavg_it_is_the_robust_method(rule, trained):
    assert torch.equal(trained(FedAvg(mean=rule)), trained(Robust(method=rule)))


def test_a_mean_by_that_name_is_the_mean(trained):
    rule = AggregateMethod(rule="mean")
    torch.testing.assert_close(trained(SymmetricCE(mean=rule)), trained(SymmetricCE()), atol=1e-6, rtol=1e-5)


def test_each_of_two_networks_has_a_rule_of_its_own(found_small):
    federation = found_small(CoTeaching(mean=MEDIAN))
    replies = run_round(federation)
    expected = replies.models.transpose(0, 1).sort(1).values[:, 1:3].mean(1)  # the middle two of four
    torch.testing.assert_close(federation.server["model"], expected, atol=1e-7, rtol=0)


def test_what_a_server_makes_of_a_mean_it_makes_of_the_rule_s(found_small):
    plain = found_small(FedExP(mean=MEDIAN))
    before = dict(plain.server)
    replies = run_round(plain)
    middle = found_small(FedAvg(mean=MEDIAN))
    run_round(middle)
    expected = FedExP().aggregate(before, replies._replace(mean=middle.server["model"]), 0)
    assert torch.equal(plain.server["model"], expected["model"])
    centroids = found_small(RobustFL(mean=MEDIAN))
    run_round(centroids)
    assert "centroids" in centroids.server


def test_a_hostile_client_moves_a_mean_and_not_the_rule(found_small):
    federation = found_small(FedAvg(mean=MEDIAN))
    replies = run_round(federation)
    models = replies.models.clone()
    models[1] += 1e6
    broken = replies._replace(models=models, mean=models.mean(0))
    moved = conclude(federation.method, federation.server, broken, 0)["model"]
    assert (moved - federation.server["model"]).abs().max() < 1
    assert (broken.mean - federation.server["model"]).abs().max() > 1e5


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (FedNoRo(mean=MEDIAN), "FedNoRo makes its own of the models of a round"),
        (Robust(mean=MEDIAN), "Robust makes its own"),
        (FedAvg(mean=AggregateMethod(weights=(1.0, 2.0))), "clients weigh what they own"),
        (FedAvg(mean=AggregateMethod(rule="foolsgold")), "foolsgold remembers rounds"),
    ],
)
def test_where_no_rule_can_stand(method, match, found_small):
    with pytest.raises(ValueError, match=match):
        found_small(method)


def test_models_that_are_not_finite_are_named(found_small):
    federation = found_small(FedAvg(mean=MEDIAN))
    replies = run_round(federation)
    lengths = replies.lengths.clone()
    lengths[2] = torch.nan
    with pytest.raises(ValueError, match=r"the models of clients \[2\] are not finite"):
        conclude(federation.method, federation.server, replies._replace(lengths=lengths), 1)
    with pytest.raises(ValueError, match="client 7, whom fltrust trusts, is not in the cohort"):
        conclude(
            replace(federation.method, mean=AggregateMethod(rule="fltrust", root=7)), federation.server, replies, 1
        )
