"""Mixing steps as matrices: what they make of the points, and what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.aggregate.mixes import adaptive_clipping, bucketing, nearest_neighbour_mixing, static_clipping

clouds = st.builds(
    lambda N, D, seed: torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
    st.integers(2, 12),
    st.integers(1, 9),
    st.integers(0, 2**16),
)


@given(clouds, st.integers(0, 1))
def test_nearest_neighbours_with_oneself_first(points, f):
    apart = (points[:, None] - points[None]).norm(dim=2)
    near = apart.argsort(dim=1)[:, : len(points) - f]
    assert_close(nearest_neighbour_mixing(points @ points.T, f) @ points, points[near].mean(1))


def test_of_equal_points_each_still_counts_itself():
    points = torch.ones(6, 3, dtype=torch.float64)
    mixed = nearest_neighbour_mixing(points @ points.T, 4)
    assert (mixed.diagonal() == 0.5).all()


@given(clouds, st.integers(1, 5), st.integers(0, 2**16))
def test_buckets_hold_every_point_once(points, size, seed):
    N = len(points)
    rows = bucketing(points @ points.T, size, torch.Generator().manual_seed(seed))
    members = (rows > 0).sum(1).tolist()
    assert members == [size] * (N // size) + ([N % size] if N % size else [])
    assert_close(rows.sum(1), torch.ones(len(rows), dtype=rows.dtype))
    assert ((rows > 0).sum(0) == 1).all()


def test_buckets_are_drawn_by_the_generator():
    gram = torch.eye(20, dtype=torch.float64)
    first, again, other = (bucketing(gram, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(clouds, st.floats(0.01, 10))
def test_static_clipping_cuts_to_the_radius(points, radius):
    cut = static_clipping(points @ points.T, radius) @ points
    norms = points.norm(dim=1)
    assert_close(cut.norm(dim=1), norms.clamp_max(radius))
    assert_close(torch.cosine_similarity(cut, points), torch.ones(len(points), dtype=cut.dtype))


@given(clouds)
def test_adaptive_clipping_cuts_the_longest_to_the_next(points):
    N, f = len(points), (len(points) - 1) // 3
    cut = 2 * f * (N - f) // N
    lengths = points.norm(dim=1)
    limit = lengths.sort().values[N - cut - 1]
    got = (adaptive_clipping(points @ points.T, f) @ points).norm(dim=1)
    assert_close(got, lengths.clamp_max(limit))


def test_points_of_length_zero_stay():
    assert torch.equal(static_clipping(torch.zeros(3, 3), 1.0), torch.eye(3))
    assert torch.equal(adaptive_clipping(torch.zeros(3, 3), 1), torch.eye(3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda gram: nearest_neighbour_mixing(gram, 5), "f must be in 0..N - 1, got f=5, N=5"),
        (lambda gram: bucketing(gram, 0, torch.Generator()), "got size=0"),
        (lambda gram: static_clipping(gram, 0.0), "radius must be positive, got 0.0"),
        (lambda gram: adaptive_clipping(gram, 3), "2f < N, got f=3, N=5"),
        (lambda gram: nearest_neighbour_mixing(gram * torch.nan, 1), "rows .* are not finite"),
    ],
)
def test_bad_settings_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.eye(5, dtype=torch.float64))
