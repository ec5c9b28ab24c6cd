"""Geometric median in the space of coefficients: Newton steps on the Gram matrix of N points, whatever their dimension.

    minimise f(x) = sum_i w_i ||x - p_i||   over   x = c + sum_i a_i (p_i - c),  sum a = 1

With K_ij = <p_i - c, p_j - c> and q = a'Ka:   r_i^2 = ||x - p_i||^2 = K_ii - 2 (Ka)_i + q,  v_i = w_i / r_i, s = sum v,
the gradient is sum_i (s a - v)_i (p_i - c), and Newton's step solves an N x N system (see `_newton_step`).

1. The best point p_k of the given ones is found. If the pull of the others there is no more than its own weight it is
   the median (Vardi and Zhang, PNAS 97, 2000): the row itself is the answer.
2. Otherwise the start lies below all given points, so no later iterate can stall on one.
3. Newton, halved until f falls; Weiszfeld's step a = v / s where that fails.
4. Points on one line: the weighted median along it, the midpoint of the segment where there is one.

Every result carries a bound on (f(x) - f*) / f(x), from K alone: the least of three (`_gap`).

Batched: B problems take their steps together; those that are done wait.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CONVERGED, ANCHOR, COLLINEAR, MAX_ITER = range(4)
STATUS = ("converged", "anchor", "collinear", "max_iter")

HALVINGS = 20
POLISH = 2
ROUNDING = 2.0**-50  # of the sum of what each point gains or loses
SLACK = 1e-12  # of half the weight, which sums of weights may miss by rounding
COINCIDENT = 2.0**-46  # squared distance over squared norms: float64 sums of equal rows may differ so much


class Solution(NamedTuple):
    """Of B problems of N points each, everything float64.

    coefficients  [B, N]     of x = sum a_i p_i; they sum to one
    gap           [B]        upper bound of (f(x) - f*) / f(x)
    status        [B] int64  index into STATUS: gap at most tol; a given point; midpoint of many medians; gap above tol
    gram          [B, N, N]  of the points around the best one of them
    """

    coefficients: Tensor
    gap: Tensor
    status: Tensor
    gram: Tensor


class _At(NamedTuple):
    """What coefficients a [B, N] mean: distances r [B, N] of all points, pulls v = w / r, f = <w, r> [B].

    gain   [B]   f less f at the point around which K is, not as a difference of two sums: one far point makes f so
                 large that float64 would not see the others in it
    noise  [B]   what float64 does not tell from no gain
    """

    a: Tensor
    Ka: Tensor
    q: Tensor
    r: Tensor
    v: Tensor
    f: Tensor
    gain: Tensor
    noise: Tensor


def solve(gram: Tensor, weights: Tensor, tol: float, max_steps: int, resolution: float) -> Solution:
    """Geometric medians from Gram matrices [B, N, N] around any centres, and weights [B, N] >= 0, some of each > 0.

    resolution   relative rounding of the entries of `gram`
    """
    w = weights / weights.sum(1, keepdim=True)
    best, there, K = recentre(gram, w)
    start = one_hot(best, w)
    pulls, own, norm = _pull(K, w, there)
    excess = (norm - own).clamp_min(0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    noise = resolution * (diagonal + diagonal.gather(1, best[:, None]))
    is_segment, segment = _median_segment(K, w, noise)
    at_best = ~is_segment & (excess <= own * (4 * resolution))
    escape = _escape(K, w, start, pulls, norm, excess)
    a = torch.where(is_segment[:, None], segment, torch.where(at_best[:, None], start, escape))
    stays = (a == start).all(1)  # at the best point: the median, or so near it that no step's gain can be seen
    gap = torch.where(stays, excess / norm.clamp_min(torch.finfo(w.dtype).tiny), _gap(K, w, at(K, w, a)))
    a, gap = _newton(K, w, a, gap, stays | is_segment, max_steps)
    status = torch.where(gap <= tol, CONVERGED, MAX_ITER)
    status = torch.where(at_best, ANCHOR, torch.where(is_segment, COLLINEAR, status))
    return Solution(a, gap, status, K)


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """[B, N] with a one at index [B] of each row."""
    return torch.zeros_like(like).scatter_(1, index[:, None], 1.0)


def distances_squared(gram: Tensor) -> Tensor:
    """||p_i - p_j||^2 [B, N, N] from a Gram matrix around any centre."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    return (diagonal[:, :, None] + diagonal[:, None, :] - 2 * gram).clamp_min(0)


def _row(gram: Tensor, index: Tensor) -> Tensor:
    return gram.gather(1, index[:, None, None].expand(-1, 1, gram.shape[2]))[:, 0]


def recentre(gram: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The point [B] with the least weighted sum of distances, which points lie there [B, N], the Gram matrix around it.

    Points closer than float64 can tell from `gram` count as one. Around the point itself it tells all that differ.
    """
    sums = (distances_squared(gram).sqrt() * w[:, None, :]).sum(2)
    best = torch.where(w > 0, sums, torch.inf).argmin(1)
    row = _row(gram, best)
    own, diagonal = row.gather(1, best[:, None]), gram.diagonal(dim1=1, dim2=2)
    there = diagonal + own - 2 * row <= COINCIDENT * (diagonal + own)
    return best, there, gram - row[:, None, :] - row[:, :, None] + own[:, :, None]


def magnification(gram: Tensor, w: Tensor) -> Tensor:
    """[B]: how many times the relative rounding of the entries of `gram` shows in f at the best point.

    Large where the centre lies far from the points beside their spread: then `gram` should be taken around that point.
    Infinite where points seem to coincide with it: around it, they do so or not.
    """
    best, there, K = recentre(gram, w)
    row, diagonal = _row(gram, best), gram.diagonal(dim1=1, dim2=2)
    own = row.gather(1, best[:, None])
    squared = torch.where(there, 1.0, K.diagonal(dim1=1, dim2=2))
    weighs = (w > 0) & ~there
    f = torch.where(weighs, w * squared.sqrt(), 0.0).sum(1)
    noise = torch.where(weighs, w * (diagonal + own + 2 * row.abs()) / (2 * squared.sqrt()), 0.0).sum(1)
    shared = ((there & (w > 0)).sum(1) > 1) & (own[:, 0] > 0)
    return torch.where(shared, torch.inf, noise / f.clamp_min(torch.finfo(f.dtype).tiny))


def at(K: Tensor, w: Tensor, a: Tensor) -> _At:
    Ka = (K @ a[:, :, None])[:, :, 0]
    q = (a * Ka).sum(1)
    squared = K.diagonal(dim1=1, dim2=2)
    change = q[:, None] - 2 * Ka
    floor = torch.finfo(K.dtype).tiny ** 0.5  # keeps the pull finite; no iterate lies on a point that weighs
    r = (squared + change).clamp_min(floor).sqrt()
    gains = w * change / (r + squared.clamp_min(0).sqrt())
    return _At(a, Ka, q, r, w / r, (w * r).sum(1), gains.sum(1), ROUNDING * gains.abs().sum(1))


def curvature(K: Tensor, x: _At) -> tuple[Tensor, Tensor]:
    """M = s I - D^1/2 G D^1/2 and D^1/2, where D = diag(w / r^3) and G holds the products of x - p_i."""
    root = x.v.sqrt() / x.r
    G = K - x.Ka[:, :, None] - x.Ka[:, None, :] + x.q[:, None, None]
    M = -root[:, :, None] * G * root[:, None, :]
    M.diagonal(dim1=1, dim2=2).add_(x.v.sum(1, keepdim=True))
    return M, root


def solve_positive(M: Tensor, right: Tensor) -> Tensor:
    """M^-1 right [B, N] for positive definite M; NaN for those that rounding has left indefinite."""
    factor, failed = torch.linalg.cholesky_ex(M)
    solution = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    return solution.where((failed == 0)[:, None], torch.nan)


def _pull(K: Tensor, w: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At the best point, around which K is: pulls of the others [B, N], weight there [B], norm of the pull [B]."""
    squared = torch.where(there, 1.0, K.diagonal(dim1=1, dim2=2))
    v = torch.where(there, 0.0, w / squared.sqrt())
    norm = (v * (K @ v[:, :, None])[:, :, 0]).sum(1).clamp_min(0).sqrt()
    return v, (w * there).sum(1), norm


def _escape(K: Tensor, w: Tensor, here: Tensor, v: Tensor, norm: Tensor, excess: Tensor) -> Tensor:
    """A start lower than all points: along the pull from the best of them, or the mean; the best itself if none is."""
    s = v.sum(1)
    step = excess / (s * norm).clamp_min(torch.finfo(K.dtype).tiny)
    along = v - s[:, None] * here  # sum of v_j (p_j - p_k)
    a, lowest, found = here, torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.bool)
    for halving in range(HALVINGS):
        trial = here + (step * 0.5**halving)[:, None] * along
        value = at(K, w, trial).gain
        better = ~found & (value < lowest)
        a, lowest, found = torch.where(better[:, None], trial, a), torch.where(better, value, lowest), found | better
        if bool(found.all()):
            break
    return torch.where((at(K, w, w).gain < lowest)[:, None], w, a)


def _newton_step(K: Tensor, x: _At) -> Tensor:
    """Change of a. The step is sum_i c_i (x - p_i) with c = D^1/2 y and M y = D^-1/2 gamma, gamma = s a - v.

    gamma rather than -v, which gives the same step: near the median it is small, and so is its rounding.
    """
    M, root = curvature(K, x)
    gamma = x.v.sum(1, keepdim=True) * x.a - x.v
    c = root * solve_positive(M, torch.where(root > 0, gamma / root, 0.0))
    return c.sum(1, keepdim=True) * x.a - c


def _newton(K: Tensor, w: Tensor, a: Tensor, gap: Tensor, rests: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    """Coefficients and gaps after at most max_steps steps; those of problems that rest stay as they are."""
    x, done = at(K, w, a), rests
    for _ in range(max_steps):
        if bool(done.all()):
            break
        step = _newton_step(K, x)
        moved, found = x, done
        for halving in range(HALVINGS + 1):
            target = x.a + 0.5**halving * step if halving < HALVINGS else _weiszfeld(x)
            trial = at(K, w, target)
            # The full step may be taken where f stands still: there it knows x better than f does.
            better = ~found & (trial.gain <= x.gain + x.noise * (1 if halving == 0 else -1))
            moved = _At(*(torch.where(_like(better, new), new, old) for new, old in zip(trial, moved, strict=True)))
            found = found | better
            if bool(found.all()):
                break
        gap = torch.where(done, gap, _gap(K, w, moved))
        done = done | ~found | (moved.gain >= x.gain - x.noise)
        x = moved
    # At the median itself a = v / s: the same point with coefficients that are positive, and so do not cancel. From
    # there the step is exact to rounding, beyond what f can tell: where f is flat, x was found to half the digits.
    for _ in range(POLISH):
        near = at(K, w, _weiszfeld(x))
        trial = at(K, w, near.a + _newton_step(K, near))
        takes = ~rests & (trial.gain <= x.gain + x.noise)
        x = _At(*(torch.where(_like(takes, new), new, old) for new, old in zip(trial, x, strict=True)))
    positive = _weiszfeld(x)
    last = _gap(K, w, at(K, w, positive))
    takes = ~rests & (last <= gap.clamp_min(1e-13))
    return torch.where(takes[:, None], positive, x.a), torch.where(takes, last, gap)


def _weiszfeld(x: _At) -> Tensor:
    """The step that never raises f."""
    return x.v / x.v.sum(1, keepdim=True)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask if tensor.ndim == 1 else mask[:, None]


def _gap(K: Tensor, w: Tensor, x: _At) -> Tensor:
    """Least of three bounds of (f(x) - f*) / f(x); weights sum to one.

    (a) 2 ||g||, since f(x) - f* <= ||g|| ||x - x*|| and ||x - x*|| <= f(x) + f*
    Two by duality: vectors y_i that sum to zero, ||y_i|| <= w_i, give f* >= sum <y_i, p_i - x>. The unit pulls
    v_i (p_i - x) sum to -g; they are made to sum to zero (b) by w_i g each, or (c) by g on the nearest point alone, and
    then divided by max ||y_i|| / w_i. Beside a point only (c) is tight.
    """
    gamma = x.v.sum(1, keepdim=True) * x.a - x.v
    Kg = (K @ gamma[:, :, None])[:, :, 0]
    g2 = (gamma * Kg).sum(1).clamp_min(0)
    b = Kg - (x.a * Kg).sum(1, keepdim=True)  # <p_i - x, g>
    heavy = w > 0
    weight = torch.where(heavy, w, 1.0)
    all_ = torch.where(heavy, 1 + 2 * x.v * b / weight + g2[:, None], 1.0).clamp_min(1.0).amax(1).sqrt()
    by_all = (x.f + (w * b).sum(1)) / all_
    k = torch.where(heavy, x.r, torch.inf).argmin(1, keepdim=True)
    own, pull, dot = (t.gather(1, k)[:, 0] for t in (w, x.v, b))
    by_one = (x.f + dot) / (1 + (2 * pull * dot + g2) / own**2).clamp_min(1.0).sqrt()
    lower = torch.maximum(by_all, by_one) / x.f
    return torch.minimum(2 * g2.sqrt(), 1 - lower).clamp_min(0)


def _median_segment(K: Tensor, w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Where all points lie on one line and a whole segment of it is median [B], and a of its midpoint [B, N].

    K is around one of the points; noise [B, N] is the rounding of K_ii and, the mean of two, of K_ij. On a line without
    such a segment the best point is the median.
    """
    heavy = w > 0
    diagonal = torch.where(heavy, K.diagonal(dim1=1, dim2=2), 0.0)
    far = diagonal.argmax(1)
    row, top = _row(K, far), diagonal.gather(1, far[:, None])
    across = torch.where(heavy, diagonal * top - row**2, 0.0)  # (|p_i| |p_far| sin)^2
    of_far = noise.gather(1, far[:, None])
    rounding = noise * top + of_far * diagonal + (noise + of_far) * row.abs()
    on_line = (across <= 4 * rounding).all(1)
    length = top.sqrt()
    place = torch.where(heavy, row / length.clamp_min(torch.finfo(K.dtype).tiny), torch.inf)
    order = place.argsort(dim=1, stable=True)
    below = w.gather(1, order).cumsum(1)
    first = (below >= 0.5 - SLACK).to(torch.int8).argmax(1, keepdim=True)
    last = (below > 0.5 + SLACK).to(torch.int8).argmax(1, keepdim=True)
    ends = [order.gather(1, end) for end in (first, last)]
    least = of_far / length.clamp_min(torch.finfo(K.dtype).tiny)
    apart = (place.gather(1, ends[1]) - place.gather(1, ends[0]) > least)[:, 0]
    halves = [torch.zeros_like(w).scatter_(1, end, 0.5) for end in ends]
    return on_line & apart, halves[0] + halves[1]
