"""Noisy clients are found by their rows, whatever their order, and nobody where there is nothing to see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.federated.noisy_clients import noisy_clients, scaled


def rows(K, C, *, seed=0, apart=0.0, every=2):
    """Losses around one; every second client's lie higher."""
    losses = 1 + 0.3 * torch.randn(K, C, generator=torch.Generator().manual_seed(seed))
    losses[::every] += apart
    return scaled(losses, torch.ones(K, C))


def test_columns_are_scaled_and_the_least_stands_in_for_what_is_missing():
    losses = torch.tensor([[1.0, 5.0, 2.0, torch.nan], [3.0, 5.0, 0.0, 0.0], [2.0, 5.0, 4.0, 0.0]])
    counts = torch.tensor([[2, 1, 1, 0], [1, 1, 0, 0], [4, 1, 3, 0]])
    expected = [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0]]
    assert scaled(losses, counts).tolist() == expected


def test_a_loss_that_is_no_number_is_refused_by_name():
    losses = torch.ones(4, 3)
    losses[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"clients \[2\]"):
        scaled(losses, torch.ones(4, 3))


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize(("K", "C", "every"), [(6, 2, 2), (20, 10, 2), (20, 10, 5), (30, 40, 3)])
def test_two_groups_are_told_apart(covariance, separated, K, C, every):
    found = noisy_clients(rows(K, C, apart=3.0, every=every), covariance=covariance, separated=separated)
    assert found.nonzero().flatten().tolist() == list(range(0, K, every))


@settings(max_examples=4)
@given(st.integers(0, 100), st.integers(3, 12), st.permutations(range(12)))
def test_the_answer_does_not_depend_on_the_clients_order(seed, K, permutation):
    losses = rows(K, 4, seed=seed, apart=0.3)  # hard to tell apart
    order = torch.tensor([i for i in permutation if i < K])
    assert torch.equal(noisy_clients(losses[order]), noisy_clients(losses)[order])


def test_equal_rows_are_nobodys_fault():
    assert noisy_clients(torch.full((7, 3), 0.4, dtype=torch.float64)).tolist() == [False] * 7


def test_separation_leaves_a_clean_federation_alone():
    alike = [rows(20, 10, seed=seed) for seed in range(20)]
    assert all(noisy_clients(one).any() for one in alike[:4])  # two components are always two
    assert sum(bool(noisy_clients(one, separated=True).any()) for one in alike) <= 1
