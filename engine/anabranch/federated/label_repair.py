"""How well a method finds clients with wrong labels and mends them, told by one who knows the truth.

MaskedOptim's small table (methods/maskedoptim.py), for every method that calls clients noisy or learns labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.federated.rounds import Federation


class Repair(NamedTuple):
    """found    F1 of the clients called noisy; None if the method calls nobody, or if no client has more wrong labels
             than another
    before   share of right labels among those given to clients that were called noisy, or to all if it calls nobody
    after    of the labels that these have learned instead; both None for a method that learns none
    """

    found: float | None
    before: float | None
    after: float | None


def repair(federation: Federation, truth: Tensor, rates: Tensor) -> Repair:
    """Of a federation as it stands.

    truth  [M] int64     the right labels of its samples
    rates  [K] float64   share of wrong labels of each client; those above the mean of the lowest and the highest count
                         as noisy
    """
    f, middle = federation, (rates.min() + rates.max()) / 2
    called = f.server.get("noisy")
    found = None if called is None or not rates.max() > rates.min() else f1(called, rates > middle)
    given, learned = [], []
    for k in sorted(f.kept):
        labels = f.kept[k].get("labels")
        if labels is None or (called is not None and not called[k]):
            continue
        mine = f.holdings.owned[k]
        given.append(f.holdings.y[mine] == truth[mine])
        learned.append(labels.argmax(1) == truth[mine])
    if not given:
        return Repair(found, None, None)
    return Repair(found, *(float(torch.cat(right).double().mean()) for right in (given, learned)))


def f1(found: Tensor, truth: Tensor) -> float:
    """2 hits / (2 hits + misses + false alarms), of found [K] bool and the truth [K] bool; 1 where both are empty."""
    wrong, hits = int((found ^ truth).sum()), int((found & truth).sum())
    return 2 * hits / (2 * hits + wrong) if hits or wrong else 1.0
