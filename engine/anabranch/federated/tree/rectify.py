"""Repairing what a teacher says where it is wrong, before it is handed on (FedEEC's "self-knowledge rectification").

A rule takes probabilities [B, C], the classes y [B] and a history, and gives the probabilities to hand on. Predictions
whose largest entry is the true class pass as they are; of the others the true class becomes the largest.

    off        nothing is repaired
    ring:20    the true class gets the mean of the last 20 right predictions of that class (of the largest entry, if
               there are none) and the others share the rest as before
    swap       the true class and the largest entry change places
    mix:0.5    half of the prediction, half of the truth

Reconstructed here (FedEEC, arXiv 2501.00693, whose formula could not be read): all of it. `ring` is the rule that its
description suggests. All keep the order of the other classes, but for the one that `swap` puts down.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 1e-3  # by which the true class is lifted above the others where a rule leaves it below or beside them
DEFAULTS = {"ring": 20.0, "mix": 0.5}
RULES = ("off", "ring", "swap", "mix")


class Ring(NamedTuple):
    """The latest right predictions of each class, the newest at the end.

    values  [C, q] float32   their entry of the true class; 0 in places that are not filled yet
    counts  [C] int64        filled places
    """

    values: Tensor
    counts: Tensor


Rule = Callable[[Tensor, Tensor, Ring], tuple[Tensor, Ring]]


def empty(classes: int, length: int) -> Ring:
    """A history of nothing."""
    return Ring(torch.zeros(classes, length), torch.zeros(classes, dtype=torch.int64))


def parse_rule(text: str) -> tuple[Rule, int]:
    """The rule of a text such as those above, and how long its rings are. ValueError says what is allowed."""
    name, given, amount = text.partition(":")
    try:
        value = float(amount) if given else DEFAULTS.get(name, 0.0)
    except ValueError:
        value = -1.0
    if (
        name not in RULES
        or (given and name not in DEFAULTS)
        or (name == "ring" and not (value >= 1 and value.is_integer()))
    ):
        raise ValueError(f"rectify is off, ring:LENGTH, swap or mix:SHARE, got {text!r}")
    if name == "mix":
        if not 0 <= value <= 1:
            raise ValueError(f"the share of the prediction in a mix must be in [0, 1], got {text!r}")
        return (lambda p, y, ring: (mix(p, y, value), ring)), 1
    if name == "ring":
        return rectify_by_ring, int(value)
    return {"off": lambda p, y, ring: (p, ring), "swap": lambda p, y, ring: (swap(p, y), ring)}[name], 1


def wrong(p: Tensor, y: Tensor) -> Tensor:
    """[B] bool: the predictions that a rule repairs."""
    return p.argmax(1) != y


def swap(p: Tensor, y: Tensor) -> Tensor:
    """The true and the largest entry change places."""
    true, (largest, top) = _of(p, y), p.max(1)
    return _lifted(p.scatter(1, top[:, None], true[:, None]).scatter(1, y[:, None], largest[:, None]), p, y)


def mix(p: Tensor, y: Tensor, share: float) -> Tensor:
    """`share` of the prediction and the rest of the truth."""
    return _lifted(share * p + (1 - share) * torch.nn.functional.one_hot(y, p.shape[1]), p, y)


def rectify_by_ring(p: Tensor, y: Tensor, ring: Ring) -> tuple[Tensor, Ring]:
    """As if one prediction came after another: each sees the right ones before it, of this call and of earlier ones."""
    true = _of(p, y)
    means, filled, after = _means(true, ~wrong(p, y), y, ring)
    aim = torch.maximum(torch.where(filled, means, p.amax(1)), true)
    others = p * ((1 - aim) / (1 - true).clamp_min(MARGIN))[:, None]  # 1 - true is at least a half where it counts
    return _lifted(others.scatter(1, y[:, None], aim[:, None]), p, y), after


def _means(true: Tensor, right: Tensor, y: Tensor, ring: Ring) -> tuple[Tensor, Tensor, Ring]:
    """[B] means of the ring that each sample meets, [B] bool whether anything is in it, and the ring after all.

    The history of a class is one line: its ring, then what this call adds. A sample before which the call added k
    entries of its class meets places k .. k + q - 1.
    """
    (C, q), B = ring.values.shape, len(y)
    added = torch.zeros(B, C, dtype=torch.int64).scatter_(1, y[:, None], right.long()[:, None]).cumsum(0)
    line = torch.cat([ring.values.double(), torch.zeros(C, B, dtype=torch.float64)], 1)
    line[y[right], q - 1 + _of(added, y)[right]] = true[right].double()
    sums = torch.cat([torch.zeros(C, 1, dtype=torch.float64), line.cumsum(1)], 1)
    k = _of(added, y)
    size = (ring.counts[y] + k).clamp_max(q)
    means = (sums[y, k + q] - sums[y, k]) / size.clamp_min(1)
    total = added[-1] if B else torch.zeros_like(ring.counts)
    kept = line.gather(1, total[:, None] + torch.arange(q)).to(ring.values.dtype)
    return means.to(true.dtype), size > 0, Ring(kept, (ring.counts + total).clamp_max(q))


def _lifted(repaired: Tensor, p: Tensor, y: Tensor) -> Tensor:
    """The repaired predictions with the true class above all others; what was right stays as it was."""
    others = repaired.scatter(1, y[:, None], -1.0).amax(1)
    true = _of(repaired, y)
    low = true <= others
    lifted = repaired.scatter(1, y[:, None], torch.where(low, others + MARGIN, true)[:, None])
    repaired = torch.where(low[:, None], lifted / lifted.sum(1, keepdim=True), repaired)
    return torch.where(wrong(p, y)[:, None], repaired, p)


def _of(values: Tensor, y: Tensor) -> Tensor:
    """[B] the entry of each row [B, C] that belongs to its class."""
    return values.gather(1, y[:, None])[:, 0]
