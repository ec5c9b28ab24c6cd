"""What is proved of robust rules: how far f of N points, sent by anybody, can move a result.

A rule R is (f, kappa)-robust (arXiv 2302.01772) if for any N points and every N - f of them, S,

    ||R(p) - mean_S||^2  <=  kappa * mean over i in S of ||p_i - mean_S||^2

so that honest points that agree leave nothing to gain. All constants are upper bounds; those seen are far smaller.
"""

from math import sqrt


def least_kappa(N: int, f: int) -> float:
    """What no rule can be better than, whatever it computes."""
    _check(N, f)
    return f / (N - 2 * f)


def kappa(rule: str, N: int, f: int) -> float:
    """Of Krum (whose score counts N - f - 1 neighbours), the geometric median, and the median and trimmed mean of each
    coordinate. Raises ValueError for other rules."""
    ratio = least_kappa(N, f)
    known = {
        "krum": 6 * (1 + ratio),
        "geometric_median": 4 * (1 + ratio) ** 2,
        "coordinate_median": 4 * (1 + ratio) ** 2,
        "trimmed_mean": 6 * ratio * (1 + ratio),
    }
    if rule not in known:
        raise ValueError(f"no kappa is known here for {rule!r}; choose one of {sorted(known)}")
    return known[rule]


def mixing_shrinks(N: int, f: int) -> float:
    """How much of the spread of any N - f points is left after nearest_neighbour_mixing: their variance then, and how
    far their mean moved, squared, sum to no more than this times their variance before."""
    _check(N, f)
    return 8 * f / (N - f)


def kappa_after_mixing(kappa: float, N: int, f: int) -> float:
    """Of a (f, kappa)-robust rule after nearest_neighbour_mixing: of the order of f / N, which is the best there is."""
    return mixing_shrinks(N, f) * (kappa + 1)


def reach_of_median(share: float) -> float:
    """Geometric median with a share of its weight hostile: for every y it is no farther from y than this times the
    farthest honest point (Minsker, Bernoulli 21, 2015)."""
    if not 0 <= share < 0.5:
        raise ValueError(f"the hostile share must be in [0, 1/2), got {share}")
    return (1 - share) / sqrt(1 - 2 * share)


def _check(N: int, f: int) -> None:
    if f < 0 or 2 * f >= N:
        raise ValueError(f"f must be at least 0 and 2f < N, got {f=}, {N=}")
