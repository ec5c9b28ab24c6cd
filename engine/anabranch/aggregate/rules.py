"""Robust rules as functions from a Gram matrix to coefficients: they decide by inner products, never see the points.

    gram [N, N] float64, <p_i - c, p_j - c>   ->   a [N] float64   ->   c + sum_i a_i (p_i - c)

The points are read twice, by `aggregate`: once for the Gram matrix and once for the sum. Steps that mix points before a
rule sees them (mixes.py) cost no read of their own: `after` makes one vector of coefficients of both.

N   clients; f of them, at most, may send anything (Byzantine): 2f < N unless a rule asks for more
c   any centre, for rules of distances. Rules of norms and angles, and those whose coefficients do not sum to one, say
    "around zero": for them c = 0
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from anabranch_kernels.geometric_median.op import MAX_ITER, Solution, centred_gram, combine, solve

Rule = Callable[[Tensor], Tensor]  # Gram matrix [N, N] -> coefficients [N]
Mix = Callable[[Tensor], Tensor]  # Gram matrix [N, N] -> rows [M, N] of coefficients, of M new points

MOST_SUBSETS = 50_000  # that smea tries


def aggregate(points: Tensor, rule: Rule, *, centre: Tensor | None = None) -> Tensor:
    """One vector from N by a rule, in two reads of the points.

    points   [N, D]  float64, float32, bfloat16 or float16
    centre   [D]     dtype of points; near the points, for accuracy; None for zero, which some rules need
    returns  [D]     dtype of points

    Raises ValueError for shapes and dtypes that do not fit and for rows that are not finite.
    """
    if points.ndim != 2:
        raise ValueError(f"points must be [N, D], got {list(points.shape)}")
    rows, middle = points[None], None if centre is None else centre[None]
    gram = centred_gram(rows, middle)[0]
    return combine(rows, rule(_finite(gram))[None], middle)[0]


def after(mix: Mix, rule: Rule) -> Rule:
    """The rule applied to points that `mix` makes of the given ones, as one rule of those given."""

    def both(gram: Tensor) -> Tensor:
        rows = mix(gram)
        return rule(rows @ gram @ rows.T) @ rows

    return both


def mean(gram: Tensor, weights: Tensor | None = None) -> Tensor:
    """The (weighted) mean: no robustness, for comparison."""
    w = _weights(gram, weights)
    return w / w.sum()


def geometric_median(gram: Tensor, weights: Tensor | None = None, *, tol: float = 1e-6) -> Tensor:
    """The point with the least weighted sum of distances (RFA, arXiv 1912.13445), proven so up to `tol` of that sum.

    Raises RuntimeError where rounding keeps the bound above tol.
    """
    return solve_median(gram, weights, tol=tol).coefficients[0]


def solve_median(
    gram: Tensor, weights: Tensor | None = None, *, tol: float = 1e-6, resolution: float = 2.0**-52
) -> Solution:
    """The same with its bound and status, each [1]. resolution: relative rounding of the entries of `gram`."""
    solution = solve(gram[None], _weights(gram, weights)[None], tol=tol, max_steps=100, resolution=resolution)
    if solution.status.item() == MAX_ITER:
        raise RuntimeError(f"no geometric median within {tol}: the bound is {solution.gap.item():.1e}")
    return solution


def medoid(gram: Tensor, weights: Tensor | None = None) -> Tensor:
    """The given point with the least weighted sum of distances to all."""
    w = _weights(gram, weights)
    sums = squared_distances(gram).sqrt() @ w
    return _mean_of(torch.where(w > 0, sums, torch.inf).argmin()[None], gram)


def krum(gram: Tensor, f: int, *, neighbours: int | None = None) -> Tensor:
    """The point whose nearest neighbours are nearest: least sum of squared distances to them (arXiv 1703.02757).

    neighbours   how many count; N - f - 2 as in the paper if None (some libraries take N - f - 1)
    """
    return _mean_of(_krum_scores(gram, f, neighbours).argmin()[None], gram)


def multi_krum(gram: Tensor, f: int, *, chosen: int | None = None, neighbours: int | None = None) -> Tensor:
    """Mean of the points with the best Krum scores, N - f of them if `chosen` is None (arXiv 1703.02757)."""
    N = len(gram)
    chosen = N - f if chosen is None else chosen
    if not 1 <= chosen <= N:
        raise ValueError(f"chosen must be in 1..N, got {chosen} of N={N}")
    return _mean_of(_krum_scores(gram, f, neighbours).argsort(stable=True)[:chosen], gram)


def distance_trimmed_mean(gram: Tensor, f: int) -> Tensor:
    """Mean of the N - 2f points whose sums of squared distances to all are nearest to the (lower) median of these sums.

    FNBench's "trimmed mean" (arXiv 2505.06684, its code): no trimming of coordinates. Such a sum says how far from the
    mean a point lies; left out are the farthest, but the nearest too.
    """
    _check_faulty(gram, f)
    sums = squared_distances(gram).sum(1)
    return _mean_of((sums - sums.median()).abs().argsort(stable=True)[: len(gram) - 2 * f], gram)


def bulyan_selection(gram: Tensor, f: int) -> Tensor:
    """Mean of the N - 2f points that Krum chooses one after another from those left: Bulyan's selection.

    Its second part (arXiv 1802.07927), a trimmed mean of the selected in each coordinate, is no rule of distances.
    Needs N >= 4f + 3.
    """
    N = len(gram)
    if f < 0 or 4 * f + 3 > N:
        raise ValueError(f"Bulyan needs f >= 0 and N >= 4f + 3, got {f=}, {N=}")
    squared, left, selected = squared_distances(gram), list(range(N)), []
    for _ in range(N - 2 * f):
        nearest = squared[left][:, left].sort(dim=1).values[:, 1:]  # without itself
        best = int(nearest[:, : max(1, len(left) - f - 2)].sum(1).argmin())
        selected.append(left.pop(best))
    return _mean_of(torch.tensor(selected), gram)


def minimum_diameter(gram: Tensor, f: int) -> Tensor:
    """Mean of the N - f points whose largest distance from each other is least (MDA, El Mhamdi et al., PODC 2020).

    Exact: by halves over all distances, each time asking for f points without which no distance is larger. That takes
    2^f steps at worst, where trying all subsets takes N over f.
    """
    _check_faulty(gram, f)
    squared = squared_distances(gram)
    lengths = squared.unique()
    low, high = 0, len(lengths) - 1
    removed = _cover(squared > lengths[high], f)
    while low < high:
        middle = (low + high) // 2
        found = _cover(squared > lengths[middle], f)
        low, high, removed = (low, middle, found) if found is not None else (middle + 1, high, removed)
    assert removed is not None  # no distance exceeds the largest
    kept = [i for i in range(len(gram)) if i not in removed]
    while len(kept) > len(gram) - f:  # fewer than f had to go; then also whoever is farthest from the rest
        kept.pop(int(squared[kept][:, kept].sum(1).argmax()))
    return _mean_of(torch.tensor(kept), gram)


def smea(gram: Tensor, f: int) -> Tensor:
    """Mean of the N - f points whose covariance has the least largest eigenvalue (SMEA, Allouah et al., ICML 2023),
    by trying all.

    Raises ValueError where there are more than 50 000 subsets; `covariance_filter` is the rule for those.
    """
    _check_faulty(gram, f)
    N = len(gram)
    if comb(N, f) > MOST_SUBSETS:
        raise ValueError(f"{comb(N, f)} subsets of N={N} without f={f} are too many; covariance_filter is for those")
    subsets = torch.tensor(list(combinations(range(N), N - f)))
    largest = [torch.linalg.eigvalsh(_centred(gram, part))[:, -1] for part in subsets.split(1024)]
    return _mean_of(subsets[torch.cat(largest).argmin()], gram)


def covariance_filter(gram: Tensor, f: int) -> Tensor:
    """Weighted mean, weights lowered along the widest direction until N - 2f are left (CAF, Allouah et al.,
    ICML 2025).

    Each round lowers w_i by the factor 1 - t_i / max t, t_i the squared extent of p_i along the largest eigenvector of
    the weighted covariance among points that still weigh something (a point already out would stop all progress); the
    mean of the round with the least largest eigenvalue is the result.
    """
    _check_faulty(gram, f)
    N = len(gram)
    w = gram.new_ones(N)
    best, least = w / N, torch.inf
    while w.sum() > N - 2 * f:
        a = w / w.sum()
        row = gram @ a
        around = gram - row[:, None] - row[None, :] + a @ row
        values, vectors = torch.linalg.eigh(a.sqrt()[:, None] * around * a.sqrt())
        value = float(values[-1])
        if value < least:
            best, least = a, value
        extent = torch.where(w > 0, (around @ (a.sqrt() * vectors[:, -1])).square(), 0.0)
        if not extent.max() > 0:
            break
        w = w * (1 - extent / extent.max())
    return best


def centred_clipping(gram: Tensor, previous: int, radius: float, *, steps: int = 1) -> Tensor:
    """From the previous aggregate on, by the mean of all differences, each cut to `radius` (arXiv 2012.10333).

    previous   index of the row that holds the previous aggregate; all others are clients'
    """
    if not radius > 0 or steps < 1 or not 0 <= previous < len(gram):
        raise ValueError(f"need radius > 0, steps >= 1 and a row, got {radius=}, {steps=}, {previous=} of {len(gram)}")
    clients = gram.new_ones(len(gram))
    clients[previous] = 0
    a = 1 - clients
    for _ in range(steps):
        Ka = gram @ a
        r = (gram.diagonal() - 2 * Ka + a @ Ka).clamp_min(0).sqrt()
        share = clients / clients.sum() * (radius / r.clamp_min(radius))
        a = a * (1 - share.sum()) + share
    return a


def nearest_neighbours_of(gram: Tensor, f: int, own: int) -> Tensor:
    """Mean of the N - f points nearest to one's own, itself included (MoNNA's, arXiv 2209.10931)."""
    _check_faulty(gram, f)
    return _mean_of(squared_distances(gram)[own].argsort(stable=True)[: len(gram) - f], gram)


def fltrust(gram: Tensor, root: int) -> Tensor:
    """Mean of the clients' vectors at the root's length, weighted by max(0, cosine with the root) (arXiv 2012.13995).

    Around zero. root   index of the server's own vector, from data it trusts. If no client points its way, all are 0.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    lengths = norms.clamp_min(torch.finfo(gram.dtype).tiny)
    trust = (gram[root] / lengths / lengths[root]).clamp_min(0)
    trust[root] = 0
    return trust / trust.sum().clamp_min(torch.finfo(gram.dtype).tiny) * norms[root] / lengths


def foolsgold(gram: Tensor, *, confidence: float = 1.0) -> Tensor:
    """Coefficients in [0, 1] that are small for vectors which resemble another one (arXiv 1808.04866, algorithm 1).

    Around zero. In the paper these are sums of each client's updates over all rounds, and the coefficients, which do
    not sum to one, are learning rates. confidence   kappa of the logit that spreads them
    """
    N = len(gram)
    if N < 2:
        raise ValueError(f"FoolsGold compares clients, got {N}")
    lengths = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    cosine = gram / lengths[:, None] / lengths
    cosine.fill_diagonal_(0)  # nobody is judged for pointing another way
    highest = cosine.max(1).values
    # Pardoning: who resembles somebody more suspicious is judged less.
    factor = torch.where(highest[None, :] > highest[:, None], highest[:, None] / highest[None, :], 1.0)
    pardoned = cosine * factor
    rate = (1 - pardoned.max(1).values).clamp(0, 1)
    if not rate.max() > 1e-6:  # all point one way, as far as float32 rows can tell
        return torch.zeros_like(rate)
    rate = (rate / rate.max()).clamp_max(0.99)
    return (confidence * (rate.logit() + 0.5)).clamp(0, 1)


def squared_distances(gram: Tensor) -> Tensor:
    """||p_i - p_j||^2 [N, N] from a Gram matrix around any centre, zero on the diagonal."""
    diagonal = _finite(gram).diagonal()
    return (diagonal[:, None] + diagonal[None, :] - 2 * gram).clamp_min(0).fill_diagonal_(0)


def _finite(gram: Tensor) -> Tensor:
    bad = (~gram.diagonal().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"rows {bad} are not finite; leave them out and count them among the f")
    return gram


def _check_faulty(gram: Tensor, f: int) -> None:
    if f < 0 or 2 * f >= len(gram):
        raise ValueError(f"f must be at least 0 and 2f < N, got {f=}, N={len(gram)}")


def _weights(gram: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return gram.new_ones(len(gram))
    if weights.shape != gram.shape[:1] or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(f"weights must be [{len(gram)}], not negative, some positive, got {list(weights.shape)}")
    return weights.to(gram)


def _mean_of(chosen: Tensor, gram: Tensor) -> Tensor:
    a = gram.new_zeros(len(gram))
    a[chosen] = 1 / len(chosen)
    return a


def _krum_scores(gram: Tensor, f: int, neighbours: int | None) -> Tensor:
    _check_faulty(gram, f)
    N = len(gram)
    neighbours = N - f - 2 if neighbours is None else neighbours
    if not 1 <= neighbours < N:
        raise ValueError(f"Krum needs 1 to N - 1 neighbours, got {neighbours} with N={N}, f={f}")
    others = squared_distances(gram).fill_diagonal_(-1).sort(dim=1).values[:, 1:]
    return others[:, :neighbours].sum(1)


def _centred(gram: Tensor, subsets: Tensor) -> Tensor:
    """Gram matrices [C, m, m] of C subsets [C, m], each around its own mean."""
    part = gram[subsets[:, :, None], subsets[:, None, :]]
    row = part.mean(1, keepdim=True)
    return part - row - row.mT + row.mean(2, keepdim=True)


def _cover(conflicts: Tensor, budget: int) -> set[int] | None:
    """At most `budget` points without which no two are in conflict; None if there are none such."""
    near = [{j for j, conflict in enumerate(row) if conflict} for row in conflicts.tolist()]

    def search(gone: set[int], budget: int) -> set[int] | None:
        left = {i: near[i] - gone for i in range(len(near)) if i not in gone}
        worst = max(left, key=lambda i: len(left[i]))
        if not left[worst]:
            return gone
        if budget < 1:
            return None
        # Either the worst goes, or all that are in conflict with it.
        found = search(gone | {worst}, budget - 1)
        if found is None and len(left[worst]) <= budget:
            found = search(gone | left[worst], budget - len(left[worst]))
        return found

    return search(set(), budget)
