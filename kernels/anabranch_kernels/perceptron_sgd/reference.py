"""One perceptron after another, batch after batch, in float64: what autograd would do, written out."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Parts = list[tuple[Tensor, Tensor]]  # weight [in, out] and bias [out] of each layer


def perceptron_sgd(
    rows: Tensor,
    velocity: Tensor,
    x: Tensor,
    index: Tensor,
    y: Tensor,
    counts: Tensor,
    widths: Sequence[int],
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    for i, count in enumerate(counts.tolist()):
        row, moving = rows[i].double(), velocity[i].double()
        for begin in range(0, count, batch):
            some = slice(begin, min(begin + batch, count))
            slope = _slope(_parts(row, widths), x[index[i, some]].double(), y[i, some])
            moving = momentum * moving + slope + weight_decay * row
            row = row - lr * moving
        rows[i], velocity[i] = row, moving


def _parts(row: Tensor, widths: Sequence[int]) -> Parts:
    sizes = [size for a, b in pairwise(widths) for size in (a * b, b)]
    weights, biases = row.split(sizes)[::2], row.split(sizes)[1::2]
    return [(w.view(-1, len(b)), b) for w, b in zip(weights, biases, strict=True)]


def _slope(parts: Parts, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy in a row."""
    outputs = [x]
    for i, (weight, bias) in enumerate(parts, 1):
        z = outputs[-1] @ weight + bias
        outputs.append(z if i == len(parts) else z.relu())
    back = (outputs.pop().softmax(1) - F.one_hot(y, len(parts[-1][1]))) / len(y)
    slopes: list[Tensor] = []
    for (weight, _), a in zip(reversed(parts), reversed(outputs), strict=True):
        slopes = [(a.T @ back).flatten(), back.sum(0), *slopes]
        back = (back @ weight.T) * (a > 0)
    return torch.cat(slopes)
