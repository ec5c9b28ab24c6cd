"""The digits are dealt fairly, once each, as alike as was asked for."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated.digits import deal, load_digits


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_nobody_holds_what_another_holds(clients, skew, seed):
    y = torch.randint(10, (317,), generator=drawn(seed))
    held = deal(y, clients, skew=skew, generator=drawn(seed))
    assert held.shape == (clients, 317 // clients)
    assert held.unique().numel() == held.numel()


@pytest.mark.parametrize(("skew", "low", "high"), [(0.0, 0.1, 0.2), (0.5, 0.5, 0.65), (1.0, 1.0, 1.0)])
def test_skew_decides_how_alike_a_clients_digits_are(skew, low, high):
    y = torch.arange(10).repeat(1000)
    labels = y[deal(y, 10, skew=skew, generator=drawn())]
    own = labels.mode(1).values
    assert low <= (labels == own[:, None]).double().mean() <= high
    assert skew == 0 or sorted(own.tolist()) == list(range(10))


def test_the_digits():
    digits = load_digits(20, skew=0.3, generator=drawn())
    assert digits.x.shape == (20, 67, 64)
    assert digits.y.shape == (20, 67)
    assert digits.test_x.shape == (449, 64)
    assert (digits.x.min(), digits.x.max()) == (0, 1)
    held = {tuple(row) for row in digits.x.flatten(0, 1).tolist()}
    assert not held & {tuple(row) for row in digits.test_x.tolist()}  # no picture occurs twice in this set


@pytest.mark.parametrize(("clients", "skew"), [(0, 0.5), (400, 0.5), (3, -0.1), (3, 1.1)])
def test_what_cannot_be_dealt(clients, skew):
    with pytest.raises(ValueError, match=f"1 to 317 clients and a skew in \\[0, 1\\], got {clients} and {skew}"):
        deal(torch.zeros(317), clients, skew=skew, generator=drawn())


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # what is not installed cannot be imported either
    with pytest.raises(ImportError, match=r"pip install 'anabranch\[federated\]'"):
        load_digits(2, skew=0, generator=drawn())
