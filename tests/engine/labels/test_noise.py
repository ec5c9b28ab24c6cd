"""Noise that is exactly as much and of exactly the kind that was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.data.published import CIFAR10
from anabranch.labels import noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


labels = st.lists(st.integers(0, 4), min_size=0, max_size=60).map(lambda y: torch.tensor(y, dtype=torch.int64))


@given(labels, st.floats(0, 1), st.integers(0, 99))
def test_exactly_that_many_labels_are_flipped_and_none_keeps_its_class(y, rate, seed):
    count = int(len(y) * rate)
    symmetric = noise.flip_symmetric(y, rate, 5, generator(seed))
    assert int((symmetric != y).sum()) == count
    assert symmetric.numel() == 0 or 0 <= int(symmetric.min()) <= int(symmetric.max()) < 5
    paired = noise.flip_to(y, rate, noise.pairs(5), generator(seed))
    wrong = paired != y
    assert int(wrong.sum()) == count
    assert torch.equal(paired[wrong], (y[wrong] - 1) % 5)


def test_asymmetric_noise_moves_the_classes_that_look_alike():
    y = torch.arange(10).repeat(100)
    noisy = noise.flip_to(y, 0.4, noise.lookalikes(CIFAR10), generator())
    moved = {(CIFAR10[a], CIFAR10[b]) for a, b in zip(y.tolist(), noisy.tolist(), strict=True) if a != b}
    assert moved == {
        ("truck", "automobile"), ("bird", "airplane"), ("deer", "horse"), ("cat", "dog"), ("dog", "cat"),
    }  # fmt: skip
    assert int((noisy != y).sum()) == int(500 * 0.4)
    with pytest.raises(ValueError, match="pairflip"):
        noise.lookalikes(["0", "1", "2"])


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.6])
def test_what_comes_out_is_the_transition_matrix(rate):
    C, n = 5, 40_000
    y = torch.arange(C).repeat(n // C)
    for noisy, matrix in (
        (noise.flip_symmetric(y, rate, C, generator()), noise.symmetric_matrix(rate, C)),
        (noise.flip_to(y, rate, noise.pairs(C), generator()), noise.target_matrix(rate, noise.pairs(C))),
    ):
        assert_close(matrix.sum(1), torch.ones(C, dtype=torch.float64))
        # shares of 8000 samples: five standard deviations of at most 0.0056
        assert_close(noise.counted_matrix(y, noisy, C), matrix, atol=0.028, rtol=0)


def test_matrices_by_hand():
    expected = [[0.6, 0.0, 0.4], [0.4, 0.6, 0.0], [0.0, 0.4, 0.6]]
    assert_close(noise.target_matrix(0.4, noise.pairs(3)), torch.tensor(expected, dtype=torch.float64))
    expected = [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]
    assert_close(noise.symmetric_matrix(0.4, 3), torch.tensor(expected, dtype=torch.float64))
    y, noisy = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])
    expected = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert_close(noise.counted_matrix(y, noisy, 3), torch.tensor(expected, dtype=torch.float64))


def test_instance_noise_is_drawn_from_the_rows_it_keeps():
    n, C = 20_000, 4
    x, y = torch.randn(n, 3, generator=generator(1)), torch.arange(C).repeat(n // C)
    noisy, rows = noise.instance_dependent(x, y, torch.full((n,), 0.3), C, generator(2))
    assert_close(rows.sum(1), torch.ones(n, dtype=torch.float64))
    assert bool((rows >= 0).all())
    # per class, the counts have their expectation; five deviations of sqrt(n p (1 - p)) <= sqrt(n) / 2
    assert_close(noisy.bincount(minlength=C).double(), rows.sum(0), atol=2.5 * n**0.5, rtol=0)
    wrong = 1 - rows.gather(1, y[:, None])[:, 0]
    # the mean of a normal that is cut to [0, 1] three deviations away stays 0.3 to 0.001; five deviations of the mean
    assert abs(float(wrong.mean()) - 0.3) < 0.001 + 5 * 0.1 / n**0.5
    assert 0.09 < float(wrong.std()) < 0.11
    # likely ones come out: the probability of what was drawn is larger than that of a class at random
    assert float(rows.gather(1, noisy[:, None]).mean()) > 1.5 / C


def test_instance_noise_depends_on_the_instance():
    x = torch.cat([torch.ones(500, 2), -torch.ones(500, 2)])
    rows = noise.instance_dependent(x, torch.zeros(1000).long(), torch.full((1000,), 0.5), 4, generator()).rows
    shape = rows[:, 1:] / rows[:, 1:].sum(1, keepdim=True)
    assert_close(shape[0], shape[1])
    assert float((shape[0] - shape[-1]).abs().max()) > 0.05


def test_no_instance_noise_at_zero_but_its_spread():
    y = torch.arange(4).repeat(100)
    drawn = noise.instance_dependent(torch.randn(400, 3, generator=generator()), y, torch.zeros(400), 4, generator())
    assert bool((drawn.rows.gather(1, y[:, None]) >= 0.5).all())  # half a normal of deviation 0.1


def test_a_rate_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.2"):
        noise.flip_symmetric(torch.zeros(3).long(), 1.2, 3, generator())


def test_two_parts_are_as_they_were_asked_for():
    made = noise.two_parts(20_000, 4, generator(3), resistant=6, sensitive=2, shift=0.7, strength=3.0)
    assert made.x.shape == (20_000, 8)
    assert set(made.y.tolist()) == set(made.clean.tolist()) == {0, 1, 2, 3}
    wrong = made.y != made.clean
    assert float(made.rates.mean()) == pytest.approx(0.5, abs=0.01)  # z has as much below as above
    for low in (0.0, 0.25, 0.5, 0.75):  # labels are wrong as often as their rates say
        some = (made.rates >= low) & (made.rates < low + 0.25)
        assert float(wrong[some].double().mean()) == pytest.approx(float(made.rates[some].mean()), abs=0.02)
    # z is what is left of x2 around the mean of its class, and its sign pattern decides the rates
    x2 = made.x[:, 6:].double()
    means = torch.stack([x2[made.clean == c].mean(0) for c in range(4)])
    z = x2 - means[made.clean]
    slope = torch.linalg.lstsq(z, torch.logit(made.rates)[:, None]).solution[:, 0]
    assert_close(slope.abs(), torch.full((2,), 3 / 2**0.5, dtype=torch.float64), atol=0.05, rtol=0)
    # x1 says the class and nothing of the noise, given the class
    assert abs(float(torch.corrcoef(torch.stack([made.x[:, 0].double(), made.rates]))[0, 1])) < 0.03


def test_two_parts_have_a_class_that_is_linear_in_the_first():
    made = noise.two_parts(4000, 3, generator(1), resistant=4, sensitive=2, shift=1.0, strength=3.0)
    from sklearn.linear_model import LogisticRegression

    x1, x2 = made.x[:, :4].numpy(), made.x[:, 4:].numpy()
    assert LogisticRegression(C=100).fit(x1, made.clean.numpy()).score(x1, made.clean.numpy()) > 0.99
    assert LogisticRegression(C=100).fit(x2, made.clean.numpy()).score(x2, made.clean.numpy()) < 0.9
