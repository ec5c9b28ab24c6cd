"""One round of a federated server: updates of N clients to one, by the rule that its settings name.

An update is what a client's arrays differ by from those it was sent, so zero means "as before", and rules around zero
need no other centre. Rules of distances (rules.py), maybe after a step of mixes.py, give a coefficient for each client.
Rules of coordinates (anabranch_kernels.coordinate_rules) give none; the mixed updates are made for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate import mixes, rules
from anabranch.aggregate.rules import Mix, Rule
from anabranch_kernels.coordinate_rules import op as coordinates
from anabranch_kernels.geometric_median.op import MAX_ITER, centred_gram, combine
from anabranch_kernels.geometric_median.solve import solve

WEIGHTED = ("mean", "geometric_median", "medoid")  # may weigh clients
COUNTING: dict[str, Callable[[Tensor, int], Tensor]] = {  # need to know how many may be hostile
    "krum": rules.krum,
    "multi_krum": rules.multi_krum,
    "bulyan_selection": rules.bulyan_selection,
    "minimum_diameter": rules.minimum_diameter,
    "smea": rules.smea,
    "covariance_filter": rules.covariance_filter,
}
ROOTED = ("fltrust", "nearest_neighbours_of")  # compare with the server's own update
BY_COORDINATE = ("coordinate_median", "trimmed_mean", "mean_around_median", "phocas", "bulyan", "sign_majority")
RULES = (*WEIGHTED, *COUNTING, "centred_clipping", "foolsgold", *ROOTED, *BY_COORDINATE)
MIXES = ("nearest_neighbour_mixing", "bucketing", "static_clipping", "adaptive_clipping")
UNMIXED = ("foolsgold", *ROOTED)  # say something about single clients, or one of the server's own

SPREADS = 3.0  # beyond the median distance from the result: an outlier
OF_NORMAL = 1.4826  # standard deviations of a normal law in one median absolute deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """A rule by name, and its settings. Raises ValueError where they do not fit each other.

    rule      one of RULES
    mix       one of MIXES, or None
    f         clients of a round that may send anything, at most
    radius    length that updates are cut to, for centred_clipping and static_clipping
    step      what each number moves by, for sign_majority
    bucket    clients in a bucket, for bucketing
    seed      of the buckets; each round draws others
    weighted  weigh by the clients' numbers of examples, about which they may lie; for mean, geometric_median, medoid
    tol       relative bound to which the geometric median is solved
    """

    rule: str = "geometric_median"
    mix: str | None = None
    f: int = 0
    radius: float | None = None
    step: float | None = None
    bucket: int = 2
    seed: int = 0
    weighted: bool = False
    tol: float = 1e-6

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; choose one of {sorted(RULES)}")
        if self.mix is not None and self.mix not in MIXES:
            raise ValueError(f"unknown mix {self.mix!r}; choose one of {sorted(MIXES)}")
        if self.mix and self.rule in UNMIXED:
            raise ValueError(f"{self.rule} is about single clients and allows no mix, got {self.mix!r}")
        if self.weighted and (self.rule not in WEIGHTED or self.mix):
            raise ValueError(f"only {', '.join(WEIGHTED)} without a mix weigh clients, got {self.rule}, mix={self.mix}")
        self._check_length("radius", self.rule == "centred_clipping" or self.mix == "static_clipping")
        self._check_length("step", self.rule == "sign_majority")
        if self.f < 0 or self.bucket < 1 or not self.tol > 0:
            raise ValueError(f"need f >= 0, bucket >= 1, tol > 0, got {self.f}, {self.bucket}, {self.tol}")

    def _check_length(self, name: str, needed: bool) -> None:
        value = getattr(self, name)
        if needed != (value is not None) or (needed and not 0 < value < float("inf")):
            wanted = "a positive, finite" if needed else "no"
            raise ValueError(f"rule {self.rule} with mix {self.mix} takes {wanted} {name}, got {value}")


class Outcome(NamedTuple):
    """What a round made of N updates.

    update        [D]       dtype of the updates
    coefficients  [N]       float64: the update is the sum of these times the clients'; None for rules of coordinates
    gap_rel       float     bound of the geometric median's objective above the least, relative; None for other rules
    distances     [N]       float64, from each client's update to the result
    outliers      [N] bool  farther than the median distance by more than three (robust) standard deviations
    """

    update: Tensor
    coefficients: Tensor | None
    gap_rel: float | None
    distances: Tensor
    outliers: Tensor


def aggregate_updates(
    updates: Tensor,
    settings: Robust,
    *,
    round: int = 0,
    left_out: int = 0,
    weights: Tensor | None = None,
    root: Tensor | None = None,
    history: Tensor | None = None,
) -> Outcome:
    """One update from N by the rule of the settings.

    updates   [N, D]  float32 or float64, all finite
    round     its number, by which buckets are drawn
    left_out  clients that sent no usable update; they are among the f
    weights   [N]     where settings.weighted
    root      [D]     the server's own update, from data it trusts; for the rules in ROOTED
    history   [N, D]  each client's sum of updates, this round's included; for foolsgold

    Raises ValueError for too few rows for the rule and rows that are not finite, RuntimeError for a median not found.
    """
    if updates.ndim != 2 or len(updates) == 0:
        raise ValueError(f"updates must be [N, D] with N > 0, got {list(updates.shape)}")
    for name, value, wanted in (
        ("root", root, settings.rule in ROOTED),
        ("history", history, settings.rule == "foolsgold"),
        ("weights", weights, settings.weighted),
    ):
        if wanted and value is None:
            raise ValueError(f"rule={settings.rule}, weighted={settings.weighted} needs {name}")
    N = len(updates)
    points = updates if root is None else torch.cat([updates, root[None]])
    gram = centred_gram((points if history is None else history)[None])[0]
    f = max(0, settings.f - left_out)
    a, gap = None, None
    if settings.rule in BY_COORDINATE:
        update = _by_coordinate(points, gram, settings, f, _mix(settings, f, round))
    else:
        a, gap = _coefficients(gram, settings, f, _mix(settings, f, round), weights)
        update = combine(points[None], a[None])[0]
    distances = centred_gram(updates[None], update[None])[0].diagonal().sqrt()
    return Outcome(update, None if a is None else a[:N], gap, distances, _outliers(distances))


def _coefficients(
    gram: Tensor, settings: Robust, f: int, mix: Mix | None, weights: Tensor | None
) -> tuple[Tensor, float | None]:
    if settings.rule != "geometric_median":
        rule = _rule(settings, f, weights)
        return (rules.after(mix, rule) if mix else rule)(gram), None
    rows = mix(gram) if mix else torch.eye(len(gram)).to(gram)
    w = rows.new_ones(len(rows)) if weights is None else weights.to(rows)
    solution = solve((rows @ gram @ rows.T)[None], w[None], tol=settings.tol, max_steps=100, resolution=2.0**-52)
    gap = solution.gap.item()
    if solution.status.item() == MAX_ITER:
        raise RuntimeError(f"no geometric median within {settings.tol}: the bound is {gap:.1e}")
    return solution.coefficients[0] @ rows, gap


def _by_coordinate(points: Tensor, gram: Tensor, settings: Robust, f: int, mix: Mix | None) -> Tensor:
    if mix is not None:
        rows = mix(gram)
        points, gram = (rows @ points.to(rows)).to(points), rows @ gram @ rows.T
    match settings.rule:
        case "coordinate_median":
            return coordinates.coordinate_median(points[None])[0]
        case "trimmed_mean":
            return coordinates.trimmed_mean(points[None], f)[0]
        case "mean_around_median":
            return coordinates.mean_around_median(points[None], f)[0]
        case "phocas":
            return coordinates.phocas(points[None], f)[0]
        case "bulyan":
            selected = points[rules.bulyan_selection(gram, f) > 0]
            return coordinates.mean_around_median(selected[None], 2 * f)[0]
    assert settings.step is not None
    return coordinates.sign_majority(points[None])[0] * settings.step


def _rule(settings: Robust, f: int, weights: Tensor | None) -> Rule:
    match settings.rule:
        case "mean":
            return partial(rules.mean, weights=weights)
        case "medoid":
            return partial(rules.medoid, weights=weights)
        case "centred_clipping":
            assert settings.radius is not None
            return partial(_clipped_from_zero, radius=settings.radius)
        case "foolsgold":  # learning rates of single clients: with all of them at one it is the mean
            return lambda gram: rules.foolsgold(gram) / len(gram)
        case "fltrust":
            return lambda gram: rules.fltrust(gram, len(gram) - 1)
        case "nearest_neighbours_of":
            return lambda gram: rules.nearest_neighbours_of(gram, f, len(gram) - 1)
    return lambda gram: COUNTING[settings.rule](gram, f)


def _mix(settings: Robust, f: int, round: int) -> Mix | None:
    match settings.mix:
        case "nearest_neighbour_mixing":
            return partial(mixes.nearest_neighbour_mixing, f=f)
        case "bucketing":
            draws = torch.Generator().manual_seed((settings.seed * 0x9E3779B1 + round) % 2**32)
            return partial(mixes.bucketing, size=settings.bucket, generator=draws)
        case "static_clipping":
            assert settings.radius is not None
            return partial(mixes.static_clipping, radius=settings.radius)
        case "adaptive_clipping":
            return partial(mixes.adaptive_clipping, f=f)
    return None


def _clipped_from_zero(gram: Tensor, radius: float) -> Tensor:
    """Centred clipping whose previous aggregate is zero: a row of zeros, which no sum shows."""
    N = len(gram)
    return rules.centred_clipping(torch.nn.functional.pad(gram, (0, 1, 0, 1)), previous=N, radius=radius)[:N]


def _outliers(distances: Tensor) -> Tensor:
    middle = distances.quantile(0.5)
    spread = OF_NORMAL * (distances - middle).abs().quantile(0.5)
    return distances > middle + SPREADS * spread + 1e-6 * middle  # equal up to rounding is no outlier
