"""The secure sum is the plain one, in Python's integers, for any number of clients; and which methods it carries."""

from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch

from anabranch.aggregate.secure.sums import SumSettings
from anabranch.federated.choices import METHODS, choose_method
from anabranch.federated.method import FedAvg, Replies
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.private import SecureSums, aggregate_privately, beyond_sums, secure_mean, sum_settings
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


@pytest.mark.parametrize("N", [3, 7, 20])
def test_the_secure_sum_is_the_plain_one(N):
    random = torch.Generator().manual_seed(N)
    updates = torch.randn(N, 33, generator=random)
    updates[0, 0] = 1e30
    coefficients = torch.rand(N, generator=random, dtype=torch.float64)
    private = aggregate_privately(updates, coefficients)
    assert private.is_exact
    assert (private.accepted, private.clipped) == (tuple(range(N)), 1)
    step = coefficients.max() / 64
    assert private.weights == tuple(max(1, round((c / step).item())) for c in coefficients)
    for d in range(33):
        whole = [round(Fraction(min(max(x, -8.0), 8.0)) * 2**16) for x in updates[:, d].tolist()]
        wanted = Fraction(sum(w * q for w, q in zip(private.weights, whole, strict=True)), sum(private.weights) * 2**16)
        assert private.update[d].item() == float(wanted)


def test_two_clients_cannot_hide_from_each_other():
    with pytest.raises(ValueError, match="N"):
        aggregate_privately(torch.zeros(2, 5), torch.ones(2).double())


GOLDILOCKS = {"field": "goldilocks", "fraction_bits": 24, "clip": 8.0}
COUNTS = (12, 2, 19, 5, 40)


@pytest.mark.parametrize("sizes", [{"privacy": 2}, {"blocks": 2, "dropouts": 1}, {"proof": "V1"}, {"field": "f50"}])
def test_a_mean_by_samples_is_that_of_the_integers(sizes):
    updates = torch.randn(5, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    private = secure_mean(updates, COUNTS, SumSettings(**{**GOLDILOCKS, **sizes}))
    assert (private.is_exact, private.clipped, private.weights) == (True, 0, COUNTS)
    for d in range(33):
        whole = [round(Fraction(x) * 2**24) for x in updates[:, d].tolist()]
        wanted = Fraction(sum(w * q for w, q in zip(COUNTS, whole, strict=True)), sum(COUNTS) * 2**24)
        assert private.update[d].item() == pytest.approx(float(wanted), rel=1e-15, abs=0)


def small(method, **schedule):
    generator, M = torch.Generator().manual_seed(1), sum(COUNTS)
    x = torch.randn(M, 6, generator=generator)
    y = torch.randint(0, 3, (M,), generator=generator)
    return found(method, MLP((6, 7, 3)), Holdings(x, y, torch.arange(M).split(list(COUNTS))), Schedule(**schedule))


CARRIED = [
    "clipping", "co-teaching", "co-teaching-plus", "dividemix", "fedavg", "fedelr", "fedlsr", "fedprox", "joint-optim",
    "selfie", "symmetric-ce",
]  # fmt: skip


class Unread(Mapping):
    """Entries at which nobody may look, even to see whether there are any."""

    def __getitem__(self, name):
        raise AssertionError(f"looked for {name}")

    def __iter__(self):
        raise AssertionError("looked for all")

    __len__ = __iter__


def test_what_sums_can_carry():
    """A method that needs sums alone takes replies with nothing but their mean; any other does not."""
    assert sorted(name for name in METHODS if not beyond_sums(choose_method(name).method)) == CARRIED
    for name in METHODS:
        method = choose_method(name).method
        federation = small(method, rounds=2, epochs=1)
        server = federation.server
        mean = torch.full_like(server["model"], 0.5)
        bare = Replies(torch.arange(5), torch.tensor(COUNTS), None, mean, None, Unread())
        if name in CARRIED:
            server = method.aggregate(server, bare, 0)
            assert torch.equal(server["model"], mean)
            assert not any(method.survey(round) for round in range(200))
        else:
            with pytest.raises((AssertionError, AttributeError, TypeError)):
                method.aggregate({**server, "noisy": torch.arange(5) % 2 == 0}, bare, 0)


@pytest.mark.parametrize("name", ["fedavg", "co-teaching", "joint-optim", "dividemix"])
def test_a_round_by_secure_sums_is_the_plain_one(name):
    """Apart by what is rounded: 2^-21, half of the last bit after the point, and a float32's own rounding."""
    method = choose_method(name).method
    plain, secure = (small(method, rounds=3, epochs=1, share=0.8) for _ in range(2))
    secure.sums = SecureSums(sum_settings("privacy=2,fraction_bits=20"), method, 4)
    before = secure.server["model"]
    run_round(plain)
    replies = run_round(secure)
    assert (replies.models, secure.sums.clipped) == (None, 0)
    apart = (plain.server["model"] - secure.server["model"]).abs()
    assert (apart <= 2**-21 + 2**-23 * plain.server["model"].abs()).all()
    assert apart.max() > 0  # it was rounded
    assert (secure.server["model"] - before).abs().max() > 0.01
    run_round(plain)
    run_round(secure)
    torch.testing.assert_close(secure.server["model"], plain.server["model"], atol=1e-4, rtol=0)


def test_what_is_clipped_is_counted():
    federation = small(FedAvg(), rounds=3, epochs=1)
    federation.sums = SecureSums(sum_settings("clip=0.01"), FedAvg(), 5)
    before = federation.server["model"]
    run_round(federation)
    assert federation.sums.clipped > 0
    assert (federation.server["model"] - before).abs().max() <= 0.01 + 1e-6


@pytest.mark.parametrize(
    ("name", "text", "cohort", "words"),
    [
        ("fedexp", "privacy=2", 9, r"cannot carry FedExP, whose server makes more of the replies .*\(aggregate\)"),
        ("robustfl", "privacy=2", 9, r"gets more than a model from each client \(reply\) and makes more"),
        ("fednoro", "privacy=2", 9, r"asks each client something \(survey\)"),
        (
            "fedavg:mean.rule=mean",
            "privacy=2",
            9,
            r"cannot carry FedAvg, whose server takes a robust rule for the mean",
        ),
        ("fedavg", "privacy=3,dropouts=2", 6, "need 8 clients in a round, a cohort has 6"),
        ("fedavg", "privacy=0", 6, "need K, T >= 1"),
        ("fedavg", "secrecy=2", 6, "secure has no option 'secrecy'"),
        ("fedavg", "privacy", 6, "an option is written NAME=VALUE"),
        ("fedavg", "field=m13", 6, "unknown field 'm13'"),
    ],
)
def test_what_cannot_be_summed_securely(name, text, cohort, words):
    with pytest.raises(ValueError, match=words):
        SecureSums(sum_settings(text), choose_method(name).method, cohort)


def test_more_samples_than_a_field_holds_are_refused():
    federation = small(FedAvg(), rounds=3, epochs=1)
    federation.sums = SecureSums(sum_settings("field=babybear,fraction_bits=24,clip=1.0"), FedAvg(), 5)
    with pytest.raises(ValueError, match="a total weight of 78"):
        run_round(federation)
