"""Groups of clients with noise of their own, as FNBench's settings have them."""

import pytest
import torch

from anabranch.data.labelled import Labelled
from anabranch.federated.noise_groups import make_noisy, parse_groups

K, N, C = 100, 50, 10
Y = torch.arange(C).repeat(K * N // C)
X = torch.randn(K * N, 4, generator=torch.Generator().manual_seed(5))
DATA = Labelled(
    name="drawn", kind="vector", x=X, y=Y, test_x=X[:9], test_y=Y[:9], names=[str(i) for i in range(C)],
    given={"worse": (Y + 3) % C},
)  # fmt: skip
OWNED = torch.arange(K * N).split(N)


def noisy(text, seed=0):
    return make_noisy(parse_groups(text), DATA, OWNED, torch.Generator().manual_seed(seed))


def counts(made):
    return [int((made.y[one] != Y[one]).sum()) for one in OWNED]


def test_the_standard_setting_has_rates_from_0_to_396_thousandths():
    made = noisy("symmetric:0.0-0.4")
    assert counts(made) == [int(N * i * 0.4 / K) for i in range(K)]
    assert float(made.rates.max()) < 0.4
    torch.testing.assert_close(made.rates * N, torch.tensor(counts(made), dtype=torch.float64))


def test_the_mixed_setting_has_two_groups_of_fifty():
    made = noisy("symmetric:0-0.4@50,pairflip:0-0.4@50")
    assert counts(made) == 2 * [int(N * i * 0.4 / 50) for i in range(50)]
    paired = torch.cat(list(OWNED[50:]))
    wrong = made.y[paired] != Y[paired]
    assert torch.equal(made.y[paired][wrong], (Y[paired][wrong] - 1) % C)


@pytest.mark.parametrize(("text", "clients"), [("symmetric:0.6@half", 50), ("pairflip:0.6@20%", 20)])
def test_a_share_of_clients_is_noisy_and_the_others_are_clean(text, clients):
    assert counts(noisy(text)) == [30] * clients + [0] * (K - clients)


def test_a_clean_group_moves_the_noise_on():
    assert counts(noisy("clean@30,pairflip:0.5")) == [0] * 30 + [25] * 70


def test_people_are_taken_at_their_word():
    made = noisy("human:worse@10")
    assert counts(made) == [N] * 10 + [0] * 90
    with pytest.raises(ValueError, match=r"no labels 'aggre'; it has \['worse'\]"):
        noisy("human:aggre")


def test_instance_noise_is_near_its_rates():
    rates = noisy("instance:0.4").rates
    assert 0.35 < float(rates.mean()) < 0.45  # 5000 samples: seven standard deviations
    assert bool((noisy("instance:0.4@half").rates[50:] == 0).all())


def test_noise_depends_on_its_seed_alone():
    for text in ("symmetric:0.3", "instance:0.3"):
        assert torch.equal(noisy(text, 3).y, noisy(text, 3).y)
        assert not torch.equal(noisy(text, 3).y, noisy(text, 4).y)


@pytest.mark.parametrize(
    "text",
    ["", "gauss:0.3", "symmetric", "symmetric:1.2", "symmetric:0.4-0.1", "symmetric:a", "clean:0.3", "human",
     "pairflip:0.4@third", "pairflip:0.4@5@6", "symmetric:-0.1"],
)  # fmt: skip
def test_what_is_no_noise_is_refused(text):
    with pytest.raises(ValueError, match="noise"):
        parse_groups(text)


@pytest.mark.parametrize("text", ["symmetric:0.1@101", "clean@60,symmetric:0.1@60", "clean,symmetric:0.1", "clean@0"])
def test_groups_of_more_clients_than_there_are_are_refused(text):
    with pytest.raises(ValueError, match="100 clients in all"):
        noisy(text)
