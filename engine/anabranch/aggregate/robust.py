"""One round of a federated server: updates of N clients to one, by a method (settings.py).

An update is what a client's arrays differ by from those it was sent, so zero means "as before" and is the base of rules
that need one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate.method import decide, finish_of, over_rows
from anabranch.aggregate.report import outliers
from anabranch.aggregate.settings import RULES, AggregateMethod
from anabranch_kernels.geometric_median.op import centred_gram, combine

ROOTED = ("fltrust", "nearest-neighbours")  # compare with the server's own update


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
    method: AggregateMethod,
    *,
    round: int = 0,
    left_out: int = 0,
    weights: Sequence[float] | None = None,
    root: Tensor | None = None,
    history: Tensor | None = None,
) -> Outcome:
    """One update from N by a method.

    updates   [N, D]  float32 or float64, all finite
    method    for a rule in ROOTED its `root` or `own` is 0: the server's own update stands before the clients'
    round     its number, by which buckets are drawn
    left_out  clients that sent no usable update; they are among the f
    weights   [N]     of the clients, in the place of the method's
    root      [D]     the server's own update, from data it trusts; for the rules in ROOTED
    history   [N, D]  each client's sum of updates, this round's included; for foolsgold, whose coefficients are rates
                      of learning of single clients: divided by N, so that with all of them at one it is the mean

    Raises ValueError for too few rows for the rule, rows that are not finite and a median that is not found.
    """
    if updates.ndim != 2 or len(updates) == 0:
        raise ValueError(f"updates must be [N, D] with N > 0, got {list(updates.shape)}")
    rooted, foolsgold = method.rule in ROOTED, method.rule == "foolsgold"
    for name, value, wanted in (("root", root, rooted), ("history", history, foolsgold)):
        if wanted != (value is not None):
            raise ValueError(f"{method.rule} {'needs' if wanted else 'takes no'} {name}")
    points = updates if root is None else torch.cat([root[None], updates])
    method = of_round(method, round, left_out, weights)
    method.check(len(points))
    gram = centred_gram((points if history is None else history)[None])[0]
    decision, finish = decide(method, gram, resolution=2.0**-52), finish_of(method)
    if finish is None:
        a = decision.rows[0] / (len(points) if foolsgold else 1)
        update = combine(points[None], a[None])[0]
    else:
        a, update = None, over_rows(points, decision.rows, finish).to(points)
    distances = centred_gram(updates[None], update[None])[0].diagonal().sqrt()
    return Outcome(update, None if a is None else a[-len(updates) :], decision.gap, distances, outliers(distances))


def of_round(
    method: AggregateMethod, round: int, left_out: int = 0, weights: Sequence[float] | None = None
) -> AggregateMethod:
    """The method as it is in one round: buckets drawn anew, those left out counted among the f, weights [N] of its own.

    Raises ValueError for a rule that takes no weights.
    """
    if method.f is not None:
        method = replace(method, f=max(0, method.f - left_out))
    if "bucketing" in method.pre:
        # torch's CPU generator keeps 32 bits of a seed.
        method = replace(method, seed=((method.seed or 0) * 0x9E3779B1 + round) % 2**32)
    if weights is not None:
        if "weights" not in RULES[method.rule]:
            raise ValueError(f"{method.rule} takes no weights")
        method = replace(method, weights=tuple(float(w) for w in weights))
    return method
