"""Every rule against what it means, computed on the points themselves; what it promises; what it refuses."""

from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.aggregate import rules
from anabranch.aggregate.mixes import (
    adaptive_clipping,
    bucketing,
    nearest_neighbour_mixing,
    static_clipping,
)
from anabranch.aggregate.rules import after, aggregate

clouds = st.builds(
    lambda N, D, seed: torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
    st.integers(7, 11),
    st.integers(1, 9),
    st.integers(0, 2**16),
)


def cloud(N=9, D=5, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(points):
    return (points[:, None] - points[None]).norm(dim=2)


def krum_scores(points, neighbours):
    rows = distances(points).square().tolist()
    return [sum(sorted(row[:i] + row[i + 1 :])[:neighbours]) for i, row in enumerate(rows)]


@given(clouds, st.integers(1, 2))
def test_krum_and_its_kin(points, f):
    N = len(points)
    scores = krum_scores(points, N - f - 2)
    order = sorted(range(N), key=scores.__getitem__)
    assert_close(aggregate(points, partial(rules.krum, f=f)), points[order[0]])
    assert_close(aggregate(points, partial(rules.multi_krum, f=f)), points[order[: N - f]].mean(0))
    assert_close(aggregate(points, partial(rules.multi_krum, f=f, chosen=3)), points[order[:3]].mean(0))
    wider = krum_scores(points, N - f - 1)
    assert_close(aggregate(points, partial(rules.krum, f=f, neighbours=N - f - 1)), points[wider.index(min(wider))])


@given(clouds, st.integers(0, 3))
def test_trimming_by_distances_keeps_the_middle(points, f):
    sums = distances(points).square().sum(1).tolist()
    middle = sorted(sums)[(len(sums) - 1) // 2]
    kept = sorted(range(len(sums)), key=lambda i: abs(sums[i] - middle))[: len(sums) - 2 * f]
    assert_close(aggregate(points, partial(rules.distance_trimmed_mean, f=f)), points[kept].mean(0))
    if f == 0:
        assert_close(aggregate(points, partial(rules.distance_trimmed_mean, f=f)), points.mean(0))


@given(clouds)
def test_bulyan_selects_by_krum_over_and_over(points):
    left, selected, f = list(range(len(points))), [], 1
    while len(selected) < len(points) - 2 * f:
        scores = krum_scores(points[left], max(1, len(left) - f - 2))
        selected.append(left.pop(scores.index(min(scores))))
    assert_close(aggregate(points, partial(rules.bulyan_selection, f=f)), points[selected].mean(0))


@given(clouds)
def test_means_and_medoids(points):
    weights = distances(points)[0] + 0.1
    assert_close(aggregate(points, rules.mean), points.mean(0))
    assert_close(aggregate(points, partial(rules.mean, weights=weights)), weights @ points / weights.sum())
    best = (distances(points) @ weights).argmin()
    assert_close(aggregate(points, partial(rules.medoid, weights=weights)), points[best])


@given(clouds)
def test_the_geometric_median_is_no_worse_than_anything_near(points):
    x = aggregate(points, rules.geometric_median, centre=points[0])
    f = lambda y: (points - y).norm(dim=1).sum()
    step = 1e-3 * cloud(8, points.shape[1], seed=1)
    assert all(f(x) <= f(x + d) * (1 + 1e-12) for d in [*step, *-step])


@given(clouds, st.integers(1, 3))
def test_minimum_diameter_is_that_of_the_best_subset(points, f):
    apart = distances(points)
    diameter = lambda subset: max(apart[i, j].item() for i, j in combinations(subset, 2))
    best = min(diameter(subset) for subset in combinations(range(len(points)), len(points) - f))
    a = rules.minimum_diameter(points @ points.T, f)
    kept = a.nonzero()[:, 0].tolist()
    assert len(kept) == len(points) - f
    assert diameter(kept) == pytest.approx(best, rel=1e-9)
    assert_close(a[kept], torch.full((len(kept),), 1 / len(kept), dtype=a.dtype))


def test_minimum_diameter_of_many_points_needs_no_list_of_subsets():
    points = torch.cat([cloud(40, 20), cloud(20, 20, seed=1) * 0.1 + 30])
    a = rules.minimum_diameter(points @ points.T, 20)  # 4e15 subsets
    assert a.nonzero()[:, 0].tolist() == list(range(40))


@given(clouds, st.integers(1, 2))
def test_smea_has_the_least_largest_eigenvalue(points, f):
    def largest(subset):
        part = points[list(subset)] - points[list(subset)].mean(0)
        return torch.linalg.eigvalsh(part.T @ part)[-1].item()

    subsets = list(combinations(range(len(points)), len(points) - f))
    kept = rules.smea(points @ points.T, f).nonzero()[:, 0].tolist()
    assert len(kept) == len(points) - f
    assert largest(kept) == pytest.approx(min(map(largest, subsets)), rel=1e-9)


@given(clouds, st.integers(1, 2))
def test_the_covariance_filter_is_its_algorithm(points, f):
    N = len(points)
    c, best, least = torch.ones(N, dtype=points.dtype), None, torch.inf
    while c.sum() > N - 2 * f:
        mu = c @ points / c.sum()
        apart = points - mu
        values, vectors = torch.linalg.eigh((c[:, None] * apart).T @ apart / c.sum())
        if values[-1] < least:
            best, least = mu, values[-1]
        tau = (apart @ vectors[:, -1]) ** 2 * (c > 0)
        c = c * (1 - tau / tau.max())
    assert_close(aggregate(points, partial(rules.covariance_filter, f=f)), best)


@given(clouds, st.floats(0.1, 5), st.integers(1, 4))
def test_centred_clipping(points, radius, steps):
    v = points[-1]
    for _ in range(steps):
        apart = points[:-1] - v
        v = v + (apart * (radius / apart.norm(dim=1, keepdim=True).clamp_min(radius))).mean(0)
    rule = partial(rules.centred_clipping, previous=len(points) - 1, radius=radius, steps=steps)
    for centre in (None, points[2]):
        assert_close(aggregate(points, rule, centre=centre), v)


@given(clouds)
def test_nearest_to_ones_own(points):
    nearest = distances(points)[3].argsort()[: len(points) - 2]
    assert_close(aggregate(points, partial(rules.nearest_neighbours_of, f=2, own=3)), points[nearest].mean(0))


@given(clouds)
def test_fltrust(points):
    root, clients = points[0], points[1:]
    trust = torch.cosine_similarity(clients, root[None]).clamp_min(0)
    scaled = clients / clients.norm(dim=1, keepdim=True) * root.norm()
    wanted = trust @ scaled / trust.sum() if trust.sum() > 0 else torch.zeros_like(root)
    assert_close(aggregate(points, partial(rules.fltrust, root=0)), wanted)


@given(clouds)
def test_foolsgold_is_its_algorithm(points):
    assume(points.shape[1] > 1)  # in one dimension cosines are 1 or -1, and rounding decides who is more alike
    N = len(points)
    cosine = [[torch.cosine_similarity(points[i], points[j], dim=0).item() for j in range(N)] for i in range(N)]
    for i in range(N):
        cosine[i][i] = 0.0
    top = [max(row) for row in cosine]
    pardoned = [
        [c * top[i] / top[j] if top[j] > top[i] else c for j, c in enumerate(row)] for i, row in enumerate(cosine)
    ]
    rate = torch.tensor([min(1.0, max(0.0, 1 - max(row))) for row in pardoned], dtype=points.dtype)
    if rate.max() > 0:
        rate = (rate / rate.max()).clamp_max(0.99)
        rate = ((rate / (1 - rate)).log() + 0.5).clamp(0, 1)
    assert_close(rules.foolsgold(points @ points.T), rate, atol=1e-6, rtol=1e-6)


def test_foolsgold_silences_all_who_point_one_way():
    points = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None] * cloud(1, 7)
    assert not rules.foolsgold(points @ points.T).any()


def test_foolsgold_silences_those_who_say_the_same():
    points = torch.cat([cloud(6, 50), cloud(1, 50, seed=1).expand(3, 50) + 0.01 * cloud(3, 50, seed=2)])
    rate = rules.foolsgold(points @ points.T)
    assert (rate[:6] > 0.5).all()
    assert (rate[6:] < 0.01).all()


def test_a_composition_is_one_vector_of_coefficients():
    points, f = cloud(12, 30), 3
    near = distances(points).argsort(dim=1)[:, : len(points) - f]
    mixed = points[near].mean(1)
    rule = after(partial(nearest_neighbour_mixing, f=f), rules.geometric_median)
    assert_close(aggregate(points, rule, centre=points[0]), aggregate(mixed, rules.geometric_median))
    twice = after(
        partial(adaptive_clipping, f=f),
        after(lambda gram: bucketing(gram, 2, torch.Generator().manual_seed(3)), partial(rules.krum, f=1)),
    )
    clipped = adaptive_clipping(points @ points.T, f) @ points
    buckets = bucketing(points @ points.T, 2, torch.Generator().manual_seed(3)) @ clipped
    assert_close(aggregate(points, twice), aggregate(buckets, partial(rules.krum, f=1)))


ROBUST = {
    "geometric median": rules.geometric_median,
    "medoid": rules.medoid,
    "krum": partial(rules.krum, f=3),
    "multi-krum": partial(rules.multi_krum, f=3),
    "minimum diameter": partial(rules.minimum_diameter, f=3),
    "smea": partial(rules.smea, f=3),
    "covariance filter": partial(rules.covariance_filter, f=3),
    "own": partial(rules.nearest_neighbours_of, f=3, own=5),
    "mixed median": after(partial(nearest_neighbour_mixing, f=3), rules.geometric_median),
    "clipped mean": after(partial(static_clipping, radius=10.0), rules.mean),
}


@pytest.mark.parametrize("attack", ["far", "flipped", "little", "nearly nothing"])
@pytest.mark.parametrize("name", ROBUST)
def test_three_of_eleven_cannot_do_much(name, attack):
    honest = (cloud(8, 40) + 1.0).float()
    middle, spread = honest.mean(0), (honest - honest.mean(0)).norm(dim=1).mean()
    bad = {
        "far": torch.full((40,), 1e15),
        "flipped": -3 * middle,
        "little": middle - 1.5 * honest.std(0),
        "nearly nothing": torch.full((40,), 1e-30),
    }[attack]
    points = torch.cat([bad.expand(3, 40), honest])
    assert (aggregate(points, ROBUST[name]).float() - middle).norm() <= 1.5 * spread
    assert (aggregate(points, rules.mean) - middle).norm() > 1e3 or attack != "far"


def test_single_precision_rows_are_enough():
    points = cloud(9, 3000) + 5
    for rule in (rules.geometric_median, partial(rules.multi_krum, f=2), partial(rules.covariance_filter, f=2)):
        exact = aggregate(points, rule, centre=points[0])
        short = aggregate(points.float(), rule, centre=points[0].float())
        assert_close(short.double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (partial(rules.krum, f=5), "2f < N, got f=5, N=9"),
        (partial(rules.krum, f=-1), "f must be at least 0"),
        (partial(rules.krum, f=4, neighbours=9), "1 to N - 1 neighbours, got 9"),
        (partial(rules.multi_krum, f=1, chosen=0), "chosen must be in 1..N, got 0 of N=9"),
        (partial(rules.bulyan_selection, f=2), r"N >= 4f \+ 3, got f=2, N=9"),
        (partial(rules.minimum_diameter, f=5), "2f < N"),
        (partial(rules.centred_clipping, previous=9, radius=1.0), "previous=9 of 9"),
        (partial(rules.centred_clipping, previous=0, radius=0.0), "radius > 0"),
        (partial(rules.mean, weights=torch.zeros(9)), "some positive"),
        (partial(rules.medoid, weights=torch.ones(8)), r"weights must be \[9\].*got \[8\]"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(rule, words):
    with pytest.raises(ValueError, match=words):
        aggregate(cloud(), rule)


def test_too_many_subsets_are_refused():
    points = cloud(40, 3)
    with pytest.raises(ValueError, match="847660528 subsets of N=40 without f=10 are too many"):
        rules.smea(points @ points.T, 10)


def test_rows_that_are_not_finite_are_refused():
    points = cloud()
    points[4, 1], points[6] = torch.nan, torch.inf
    for rule in (rules.mean, rules.geometric_median, partial(rules.krum, f=2)):
        with pytest.raises(ValueError, match=r"rows \[4, 6\] are not finite"):
            aggregate(points, rule)
    with pytest.raises(ValueError, match=r"points must be \[N, D\], got \[9\]"):
        aggregate(points[:, 0], rules.mean)


def test_points_on_a_line_are_seen_to_be_on_it_from_any_centre():
    """Around a far centre their products are rounded more than their own size says."""
    points = torch.randn(8, 1, generator=torch.Generator().manual_seed(106), dtype=torch.float64)
    for centre in (None, points[0], points[0] + 1e3):
        x = rules.aggregate(points, rules.geometric_median, centre=centre)
        assert int((points <= x + 1e-9).sum()) >= 4
        assert int((points >= x - 1e-9).sum()) >= 4
