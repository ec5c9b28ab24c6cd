"""Wrong labels with a known truth: what becomes of y [n], and how often, as a transition matrix.

    symmetric    a wrong class, each as likely                     T = (1 - r) I + r / (C - 1) (1 1' - I)
    pairflip     the class before, y -> (y - 1) mod C              T = (1 - r) I + r P
    asymmetric   classes that look alike, in CIFAR-10 truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog
    instance     wrong the more often, and in the way, that the sample's own numbers say (Xia et al., arXiv 2006.07836)
    two parts    samples with a part that says the class, and one that also shows how likely its label is wrong

From FNBench's code (arXiv 2505.06684): exactly int(n r) labels are flipped, not each with probability r, and pairs run
downwards, where most libraries add one. Of asymmetric noise the same share of those labels that have somewhere to go.
Reconstructed here: the instance noise, from common practice, and samples of two parts, after the causal graph of
arXiv 2412.13516: class -> x1, class -> x2 <- z -> label <- class.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIKE = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
SPREAD = 0.1  # deviation of the rates of samples around their client's, under instance noise


class InstanceNoise(NamedTuple):
    """y     [n] int64: the noisy labels
    rows  [n, C] float64: what each was drawn from, the true row T(x)[y]
    """

    y: Tensor
    rows: Tensor


def flip_symmetric(y: Tensor, rate: float, classes: int, generator: torch.Generator) -> Tensor:
    """int(n * rate) of the labels [n], each to one of the other C - 1 classes."""
    which = _some(torch.arange(len(y)), len(y), rate, generator)
    by = torch.randint(1, classes, (len(which),), generator=generator)
    return y.index_put((which,), (y[which] + by) % classes)


def flip_to(y: Tensor, rate: float, target: Tensor, generator: torch.Generator) -> Tensor:
    """int(m * rate) of the m labels whose class c has target[c] != c become target[c]; target [C] int64."""
    movable = (target[y] != y).nonzero()[:, 0]
    which = _some(movable, len(movable), rate, generator)
    return y.index_put((which,), target[y[which]])


def pairs(classes: int) -> Tensor:
    """[C]: the class before each, and the last for the first."""
    return (torch.arange(classes) - 1) % classes


def lookalikes(names: Sequence[str]) -> Tensor:
    """[C]: what CIFAR-10's classes are taken for. ValueError for other names."""
    if not ALIKE.keys() <= set(names):
        raise ValueError(
            f"asymmetric noise is defined for CIFAR-10's classes; pairflip is for others, such as {names[:3]}"
        )
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[ALIKE.get(name, name)] for name in names])


def instance_dependent(x: Tensor, y: Tensor, rates: Tensor, classes: int, generator: torch.Generator) -> InstanceNoise:
    """Labels drawn from P_i: q_i softmax(x_i W[y_i]) over the other classes, and 1 - q_i for the true one.

    x      [n, ...] numbers, standardised here · y [n]
    rates  [n]      q_i is normal around it with deviation 0.1, within [0, 1]
    """
    flat = x.flatten(1).double()
    flat = (flat - flat.mean(0)) / flat.std(0, correction=0).clamp_min(1e-6)
    n, D = flat.shape
    W = torch.randn(classes, D, classes, generator=generator, dtype=torch.float64)
    scores = torch.empty(n, classes, dtype=torch.float64)
    for c in range(classes):
        scores[y == c] = flat[y == c] @ W[c]
    scores.scatter_(1, y[:, None], -math.inf)
    q = _truncated_normal(rates.double(), generator)
    rows = (q[:, None] * scores.softmax(1)).scatter_(1, y[:, None], (1 - q)[:, None])
    beyond = rows.cumsum(1) <= torch.rand(n, 1, generator=generator, dtype=torch.float64) * rows.sum(1, keepdim=True)
    return InstanceNoise(beyond.sum(1).clamp_max(classes - 1), rows)


class TwoParts(NamedTuple):
    """x      [n, resistant + sensitive] float32: x1, then x2
    clean  [n] int64     the class
    y      [n] int64     the label
    rates  [n] float64   how likely it was to be a wrong one
    """

    x: Tensor
    clean: Tensor
    y: Tensor
    rates: Tensor


def two_parts(
    n: int, classes: int, generator: torch.Generator, *, resistant: int, sensitive: int, shift: float, strength: float
) -> TwoParts:
    """Samples whose class is argmax of a linear map of x1, and whose labels are wrong with rate sigmoid(w z).

    x1 and z are normal, x2 = u(class) + z with normal u of deviation `shift`; all |w_f| are equal, so that each column
    of x2 matters, and w is `strength` long. The rates are 1/2 in the mean; a wrong label is any other one.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x1, z = normal(n, resistant), normal(n, sensitive)
    u, w = shift * normal(classes, sensitive), normal(sensitive).sign()
    clean = (x1 @ normal(resistant, classes)).argmax(1)
    rates = (z @ (strength * w / w.norm())).sigmoid()
    wrong = torch.rand(n, generator=generator, dtype=torch.float64) < rates
    by = torch.randint(1, classes, (n,), generator=generator)
    return TwoParts(torch.cat([x1, u[clean] + z], 1).float(), clean, (clean + by * wrong) % classes, rates)


def symmetric_matrix(rate: float, classes: int) -> Tensor:
    """T [C, C] float64: row y holds the probabilities of the labels that y becomes."""
    matrix = torch.full((classes, classes), rate / (classes - 1), dtype=torch.float64)
    matrix.fill_diagonal_(1 - rate)
    return matrix


def target_matrix(rate: float, target: Tensor) -> Tensor:
    """T [C, C] float64 of `flip_to`."""
    matrix = torch.eye(len(target), dtype=torch.float64)
    return (1 - rate) * matrix + rate * matrix[target]


def counted_matrix(clean: Tensor, noisy: Tensor, classes: int) -> Tensor:
    """T [C, C] float64 as it came out: shares of what each class became. A class without samples stays itself."""
    counts = (clean * classes + noisy).bincount(minlength=classes * classes).view(classes, classes).double()
    empty = counts.sum(1) == 0
    counts[empty] = torch.eye(classes, dtype=torch.float64)[empty]
    return counts / counts.sum(1, keepdim=True)


def _some(of: Tensor, count: int, rate: float, generator: torch.Generator) -> Tensor:
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of noise must be in [0, 1], got {rate}")
    return of[torch.randperm(count, generator=generator)[: int(count * rate)]]


def _truncated_normal(mean: Tensor, generator: torch.Generator) -> Tensor:
    """[n] float64: normal around `mean` [n] with deviation SPREAD, given that it lies in [0, 1]."""
    low, high = (torch.special.ndtr((bound - mean) / SPREAD) for bound in (0.0, 1.0))
    u = torch.rand(mean.shape, generator=generator, dtype=torch.float64)
    drawn: Tensor = mean + SPREAD * torch.special.ndtri(low + u * (high - low))
    return drawn.clamp(0.0, 1.0)
