"""What is proved of robust rules holds under every attack; of the mean it does not."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from anabranch.aggregate import robustness, rules
from anabranch.aggregate.mixes import nearest_neighbour_mixing
from anabranch.aggregate.robust import aggregate_updates
from anabranch.aggregate.rules import after, aggregate
from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated import attacks

N = 20
FAULTY = (4, 6, 8)  # 20 to 40 %
ATTACKS = {
    "sign flip": partial(attacks.sign_flip, scale=10.0),
    "a little": attacks.a_little_is_enough,
    "a little more": partial(attacks.a_little_is_enough, z=1.5),
    "inner product": attacks.inner_product_manipulation,
    "mimic": attacks.mimic,
    "gaussian": lambda honest, f: attacks.gaussian(honest, f, generator=torch.Generator().manual_seed(9)),
    "1e30": attacks.constant,
    "1e15": partial(attacks.constant, value=1e15),
    "nearly nothing": partial(attacks.constant, value=1e-30),
}
BREAKS_THE_MEAN = ("sign flip", "gaussian", "1e30", "1e15")


def honest_points(f, seed=0):
    """N - f points in two clusters: clients whose data differ."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(N - f, 50, generator=random, dtype=torch.float64) + 0.5
    points[: (N - f) // 3] += torch.randn(50, generator=random, dtype=torch.float64)
    return points


def attacked(name, f, seed=0):
    honest = honest_points(f, seed)
    return torch.cat([honest, ATTACKS[name](honest, f)])


def variance(points):
    return (points - points.mean(0)).square().sum(1).mean()


def trimmed_after_mixing(points, f):
    return aggregate_updates(points, AggregateMethod(rule="trimmed-mean", pre=("nnm",), f=f)).update


def mixed(rule):
    return lambda points, f: aggregate(points, after(partial(nearest_neighbour_mixing, f=f), rule(f)))


AFTER_MIXING = {
    "geometric_median": mixed(lambda f: rules.geometric_median),
    "krum": mixed(lambda f: partial(rules.krum, f=f, neighbours=N - f - 1)),
    "trimmed_mean": trimmed_after_mixing,
}
ALONE = {
    "geometric_median": lambda points, f: aggregate(points, rules.geometric_median),
    "krum": lambda points, f: aggregate(points, partial(rules.krum, f=f, neighbours=N - f - 1)),
    "trimmed_mean": lambda points, f: aggregate_updates(points, AggregateMethod(rule="trimmed-mean", f=f)).update,
    "coordinate_median": lambda points, f: aggregate_updates(points, AggregateMethod(rule="coordinate-median")).update,
}


def worst_kappa(points, result, f):
    """Largest ||R - mean_S||^2 / variance_S over the honest points as S and 40 sets drawn at random."""
    random = torch.Generator().manual_seed(1)
    sets = [torch.arange(N - f), *(torch.randperm(N, generator=random)[: N - f] for _ in range(40))]
    return max(((result - points[s].mean(0)).square().sum() / variance(points[s])).item() for s in sets)


@pytest.mark.parametrize("f", FAULTY)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", AFTER_MIXING)
def test_rules_after_mixing_are_robust(rule, attack, f):
    points = attacked(attack, f)
    bound = robustness.kappa_after_mixing(robustness.kappa(rule, N, f), N, f)
    assert worst_kappa(points, AFTER_MIXING[rule](points, f), f) <= bound


@pytest.mark.parametrize("f", FAULTY)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", ALONE)
def test_rules_alone_are_robust(rule, attack, f):
    points = attacked(attack, f)
    assert worst_kappa(points, ALONE[rule](points, f), f) <= robustness.kappa(rule, N, f)


@pytest.mark.parametrize("attack", BREAKS_THE_MEAN)
def test_the_mean_is_not_robust(attack):
    """The same inequalities, so they can fail."""
    f = 4
    points = attacked(attack, f)
    honest = points[: N - f]
    seen = (points.mean(0) - honest.mean(0)).square().sum() / variance(honest)
    for rule in AFTER_MIXING:
        own = robustness.kappa(rule, N, f)
        if attack in ("1e30", "1e15"):
            assert seen > robustness.kappa_after_mixing(own, N, f)
        assert seen > 3 * worst_honest(AFTER_MIXING[rule](points, f), honest)


def worst_honest(result, honest):
    return (result - honest.mean(0)).square().sum() / variance(honest)


@pytest.mark.parametrize("f", FAULTY)
@pytest.mark.parametrize("attack", ATTACKS)
def test_mixing_shrinks_the_spread_of_the_honest(attack, f):
    points = attacked(attack, f)
    after_it = nearest_neighbour_mixing(points @ points.T, f) @ points
    before, now = points[: N - f], after_it[: N - f]
    left = variance(now) + (now.mean(0) - before.mean(0)).square().sum()
    assert left <= robustness.mixing_shrinks(N, f) * variance(before)


@pytest.mark.parametrize("f", FAULTY)
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_median_stays_within_minskers_reach_of_every_point(attack, f):
    points = attacked(attack, f)
    honest, median = points[: N - f], aggregate(points, rules.geometric_median)
    reach = robustness.reach_of_median(f / N)
    for y in (honest.mean(0), torch.zeros(50).double(), *honest[:5], 3 * honest[0] - 2 * honest[1]):
        assert (median - y).norm() <= reach * (honest - y).norm(dim=1).max() * (1 + 1e-9)


def test_the_mean_leaves_every_reach():
    points = attacked("1e15", 4)
    honest = points[:16]
    assert (points.mean(0) - honest.mean(0)).norm() > 1e9 * (honest - honest.mean(0)).norm(dim=1).max()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("f", FAULTY)
def test_what_is_not_finite_is_refused_and_once_left_out_harmless(value, f):
    honest = honest_points(f)
    points = torch.cat([honest, torch.full((f, 50), value, dtype=torch.float64)])
    settings = AggregateMethod(pre=("nnm",), f=f)
    with pytest.raises(ValueError, match="are not finite"):
        aggregate_updates(points, settings)
    alone = aggregate_updates(honest, settings, left_out=f)
    assert_close(alone.update, honest.mean(0))  # all of the f have shown themselves: nothing is lost


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4])
def test_known_constants(share):
    f = round(share * N)
    assert robustness.least_kappa(N, f) == pytest.approx(share / (1 - 2 * share))
    for rule in ALONE:
        assert robustness.kappa(rule, N, f) >= robustness.least_kappa(N, f)
    assert robustness.reach_of_median(share) == pytest.approx((1 - share) / (1 - 2 * share) ** 0.5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="2f < N, got f=10, N=20"):
        robustness.kappa("krum", 20, 10)
    with pytest.raises(ValueError, match="no kappa is known here for 'smea'"):
        robustness.kappa("smea", 20, 3)
    with pytest.raises(ValueError, match=r"must be in \[0, 1/2\), got 0.5"):
        robustness.reach_of_median(0.5)
