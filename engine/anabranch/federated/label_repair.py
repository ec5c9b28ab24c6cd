"""How well a method finds clients with wrong labels and mends them, where the truth is known: for tests and benchmarks.

The experiments of MaskedOptim's small table (methods/maskedoptim.py): any federation, run to its end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.federated.networks.layout import forward
from anabranch.federated.rounds import Federation, run_round


class Repair(NamedTuple):
    """accuracy   of the model on other samples, mean of the last rounds
    found      [K] bool: the clients that were called noisy
    before     share of right labels among those that the found clients were given; NaN where nobody was found
    after      of the labels that they learned; `before` for a method that learns none
    """

    accuracy: float
    found: Tensor
    before: float
    after: float


def repair(federation: Federation, truth: Tensor, x: Tensor, y: Tensor, *, last: int = 10, threads: int = 1) -> Repair:
    """Run all rounds that are left.

    truth   [M] int64     the right labels of the federation's samples
    x, y    [T, ...], [T] int64   samples that no client has
    """
    f, accuracies = federation, []
    while f.round < f.schedule.rounds:
        run_round(f, threads=threads)
        if f.round > f.schedule.rounds - last:
            logits = forward(f.network, f.server["model"][:1], x[None]).logits[0]
            accuracies.append((logits.argmax(1) == y).double().mean())
    found = f.server.get("noisy", torch.zeros(len(f.holdings.owned), dtype=torch.bool))
    given, learned = [], []
    for k in found.nonzero().flatten().tolist():
        mine = f.holdings.owned[k]
        given.append(f.holdings.y[mine] == truth[mine])
        labels = f.kept.get(k, {}).get("labels")  # a client that was never visited learned nothing
        learned.append(given[-1] if labels is None else labels.argmax(1) == truth[mine])
    before, after = (torch.cat(right).double().mean().item() if right else torch.nan for right in (given, learned))
    return Repair(torch.stack(accuracies).mean().item(), found, before, after)


def f1(found: Tensor, truth: Tensor) -> float:
    """2 hits / (2 hits + misses + false alarms), of found [K] bool and the truth [K] bool; 1 where both are empty."""
    wrong, hits = int((found ^ truth).sum()), int((found & truth).sum())
    return 2 * hits / (2 * hits + wrong) if hits or wrong else 1.0
