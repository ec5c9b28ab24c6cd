"""A method as two steps: from a Gram matrix to rows of coefficients, and from these to the result.

The Gram matrix of N clients gives rows of coefficients [M, N]. One row is the sum it means; of several, a rule of
coordinates makes the result, over the M points that they make of the clients'.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.aggregate import mixes, rules
from anabranch.aggregate.rules import Mix, Rule
from anabranch.aggregate.settings import AggregateMethod
from anabranch_kernels.coordinate_rules.op import (
    coordinate_median,
    mean_around_median,
    phocas,
    sign_majority,
    trimmed_mean,
)
from anabranch_kernels.geometric_median.op import STATUS

Coordinates = Callable[[Tensor], Tensor]  # points [1, M, d] -> [1, d]


class Decision(NamedTuple):
    """What a Gram matrix of N clients says.

    rows         [M, N] float64   one row is the result; of several a rule of coordinates makes it
    gap, status  of the geometric median: (f(x) - f*) / f(x) is at most gap; a word of STATUS
    """

    rows: Tensor
    gap: float | None = None
    status: str | None = None


def decide(method: AggregateMethod, gram: Tensor, *, resolution: float) -> Decision:
    """What to do with N clients whose products are `gram` [N, N] float64.

    resolution   relative rounding of its entries
    Raises ValueError where options do not fit N or a median is not reached.
    """
    rows = torch.eye(len(gram), dtype=gram.dtype)
    for name in method.pre:
        mixed = _mix(method, name)(gram)
        rows, gram = mixed @ rows, mixed @ gram @ mixed.T
    if method.by_coordinate:
        return Decision(rows)
    weights = None if method.weights is None else torch.tensor(method.weights, dtype=gram.dtype)
    if method.rule == "geometric-median":
        tol = 1e-6 if method.tol is None else method.tol
        try:
            solution = rules.solve_median(gram, weights, tol=tol, resolution=resolution)
        except RuntimeError as error:
            raise ValueError(f"{error}; a larger tol accepts it") from error
        return Decision(solution.coefficients @ rows, float(solution.gap.item()), STATUS[int(solution.status.item())])
    coefficients = _rule(method, weights)(gram)
    if method.rule == "bulyan":
        return Decision(rows[coefficients > 0])
    return Decision(coefficients[None] @ rows)


def try_out(method: AggregateMethod, N: int) -> None:
    """ValueError for options that do not fit N clients: they are tried on unit vectors, before anything is read."""
    decision, finish = decide(method, torch.eye(N, dtype=torch.float64), resolution=0.0), finish_of(method)
    if finish is not None:
        finish(torch.zeros(1, len(decision.rows), 1))


def over_rows(points: Tensor, rows: Tensor, finish: Coordinates) -> Tensor:
    """A rule of coordinates over the M points that rows [M, n] of coefficients make of points [n, d]: [d].

    Rows that choose points take them as they are; others are summed in float32 (float64 for float64 points).
    """
    picks = rows.argmax(1)
    if not torch.equal(rows, torch.eye(rows.shape[1], dtype=rows.dtype)[picks]):
        wide = torch.float64 if points.dtype == torch.float64 else torch.float32
        points = rows.to(points.device, wide) @ points.to(wide)
    elif picks.tolist() != list(range(len(points))):
        points = points[picks.to(points.device)]
    return finish(points[None])[0]


def _mix(m: AggregateMethod, name: str) -> Mix:
    if name == "bucketing":
        assert m.bucket is not None
        generator = torch.Generator().manual_seed(m.seed or 0)
        return partial(mixes.bucketing, size=m.bucket, generator=generator)
    if name == "static-clipping":
        assert m.clip is not None
        return partial(mixes.static_clipping, radius=m.clip)
    assert m.f is not None
    return partial(mixes.nearest_neighbour_mixing if name == "nnm" else mixes.adaptive_clipping, f=m.f)


def _rule(m: AggregateMethod, weights: Tensor | None) -> Rule:
    f = m.f or 0  # checked to be there where it is needed
    table: dict[str, Rule] = {
        "mean": partial(rules.mean, weights=weights),
        "medoid": partial(rules.medoid, weights=weights),
        "krum": partial(rules.krum, f=f, neighbours=m.neighbours),
        "multi-krum": partial(rules.multi_krum, f=f, chosen=m.chosen, neighbours=m.neighbours),
        "distance-trimmed-mean": partial(rules.distance_trimmed_mean, f=f),
        "bulyan": partial(rules.bulyan_selection, f=f),
        "bulyan-selection": partial(rules.bulyan_selection, f=f),
        "minimum-diameter": partial(rules.minimum_diameter, f=f),
        "smea": partial(rules.smea, f=f),
        "covariance-filter": partial(rules.covariance_filter, f=f),
        "centred-clipping": partial(_clipping_from_base, radius=m.radius or 0.0, steps=m.steps or 1),
        "nearest-neighbours": partial(rules.nearest_neighbours_of, f=f, own=m.own or 0),
        "fltrust": partial(rules.fltrust, root=m.root or 0),
        "foolsgold": partial(rules.foolsgold, confidence=1.0 if m.confidence is None else m.confidence),
    }
    return table[m.rule]


def _clipping_from_base(gram: Tensor, radius: float, steps: int) -> Tensor:
    """Centred clipping from the base on, around which `gram` is: a further point there, of products zero."""
    N = len(gram)
    wider = gram.new_zeros(N + 1, N + 1)
    wider[:N, :N] = gram
    return rules.centred_clipping(wider, N, radius, steps=steps)[:N]


def finish_of(m: AggregateMethod) -> Coordinates | None:
    """The rule of coordinates in the end, if there is one."""
    if m.rule != "bulyan" and not m.by_coordinate:
        return None
    f = m.f or 0
    table: dict[str, Coordinates] = {
        "coordinate-median": coordinate_median,
        "lower-median": _lower_median,
        "trimmed-mean": partial(trimmed_mean, f=f),
        "mean-around-median": partial(mean_around_median, f=f),
        "phocas": partial(phocas, f=f),
        "sign-majority": lambda points: sign_majority(points) * (1.0 if m.step is None else m.step),
        "bulyan": partial(mean_around_median, f=2 * f),
    }
    return table[m.rule]


def _lower_median(points: Tensor) -> Tensor:
    """Of an even number of points the lower of the middle two: with one more below all others their number is odd."""
    return coordinate_median(F.pad(points, (0, 0, 0, 1 - points.shape[1] % 2), value=-torch.inf))
