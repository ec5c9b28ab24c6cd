"""A robust rule over the models of a round: what Robust makes of them, and what takes the mean's place under others."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anabranch.aggregate.job import aggregate_tensors
from anabranch.aggregate.robust import of_round
from anabranch.aggregate.settings import RULES, AggregateMethod, AggregateOptions
from anabranch.federated.method import FedAvg, Replies, Tensors


def conclude(method: FedAvg, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
    """What the server knows after a round: the method's rule takes the mean's place, then the method aggregates.

    Raises ValueError as `robust_mean` does.
    """
    if method.mean is not None:
        assert replies.models is not None
        rule = method.mean
        rows = zip(replies.models.unbind(1), server["model"], strict=True)
        mean = torch.stack([robust_mean(rule, models, base, replies, round) for models, base in rows])
        replies = replies._replace(mean=mean)
    return method.aggregate(server, replies, round)


def robust_mean(
    rule: AggregateMethod,
    models: Tensor,
    base: Tensor,
    replies: Replies,
    round: int,
    *,
    weighted: bool = True,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """[D] of models [m, D] that were trained from base [D]: by samples if `weighted` and the rule weighs, by each of
    the parts of `sizes` numbers alone if there are any.

    Raises ValueError for a cohort that is too small for the rule or lacks the trusted client, for models that are not
    finite, and for a median that is not found.
    """
    here = for_round(rule, replies, round, weighted=weighted)
    options = AggregateOptions(per_tensor=sizes is not None, distances=False)
    sizes = [len(base)] if sizes is None else sizes
    parts, _ = aggregate_tensors([_named(row, sizes) for row in models], here, options, base=_named(base, sizes))
    return torch.cat([parts[name] for name in _named(base, sizes)])


def for_round(rule: AggregateMethod, replies: Replies, round: int, *, weighted: bool = True) -> AggregateMethod:
    """The rule as it is for the replies of one round. Raises ValueError for models that are not finite."""
    broken = replies.clients[~replies.lengths.isfinite().all(1)].tolist()
    if broken:
        raise ValueError(f"the models of clients {broken} are not finite")
    weighs = weighted and "weights" in RULES[rule.rule] and "bucketing" not in rule.pre
    weights = replies.weights.tolist() if weighs else None
    return _of_cohort(of_round(rule, round, weights=weights), replies.clients)


def check_mean(method: FedAvg) -> None:
    """ValueError if there is a rule for a mean that the method does not take, or one that cannot stand there."""
    if method.mean is None:
        return
    if method.needs_all:
        raise ValueError(f"{type(method).__name__} makes its own of the models of a round: leave out the mean's rule")
    if method.mean.weights is not None:
        raise ValueError("clients weigh what they own: leave out the weights of the mean's rule")
    if method.mean.rule == "foolsgold":
        raise ValueError("foolsgold remembers rounds, which a mean does not: take the method robust with it")


def _of_cohort(rule: AggregateMethod, clients: Tensor) -> AggregateMethod:
    """The rule with a place in the cohort instead of a client's number."""
    for name in ("own", "root"):
        number = getattr(rule, name)
        if number is None:
            continue
        places = (clients == number).nonzero()[:, 0].tolist()
        if not places:
            raise ValueError(f"client {number}, whom {rule.rule} trusts, is not in the cohort {clients.tolist()}")
        rule = replace(rule, **{name: places[0]})
    return rule


def _named(row: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    return {str(i): part for i, part in enumerate(row.split(list(sizes)))}
