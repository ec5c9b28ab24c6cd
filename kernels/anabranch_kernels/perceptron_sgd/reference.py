"""All perceptrons at once, batch after batch, in float64: what autograd would do, written out."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors import wide


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
    row, moving = wide(rows), wide(velocity)
    train(row, moving, wide(x), index, y, counts, widths, batch, lr, momentum, weight_decay)
    rows.copy_(row)
    velocity.copy_(moving)


def train(
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
    """In place, in the dtype of rows, velocity and x."""
    n = index.shape[1]
    for begin in range(0, n, batch):
        some = slice(begin, min(begin + batch, n))
        sizes = (counts - begin).clamp(0, some.stop - begin)[:, None]
        real = torch.arange(some.stop - begin, device=rows.device) < sizes
        seen, told = (torch.where(real, of[:, some], 0) for of in (index, y))
        slope = _slope(rows, widths, x[seen], told, real.to(x.dtype) / sizes.clamp_min(1))
        moving = momentum * velocity + slope + weight_decay * rows
        velocity.copy_(torch.where(sizes > 0, moving, velocity))
        rows.sub_(torch.where(sizes > 0, moving, 0), alpha=lr)


def _slope(rows: Tensor, widths: Sequence[int], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """[N, D], of the sums of cross-entropies of x [N, B, F] and y [N, B] times weight [N, B]."""
    sizes = [size for a, b in pairwise(widths) for size in (a * b, b)]
    parts = rows.split(sizes, 1)
    weights = [part.unflatten(1, shape) for part, shape in zip(parts[::2], pairwise(widths), strict=True)]
    outputs = [x]
    for i, (w, bias) in enumerate(zip(weights, parts[1::2], strict=True), 1):
        z = torch.baddbmm(bias[:, None], outputs[-1], w)
        outputs.append(z if i == len(weights) else z.relu())
    back = (outputs.pop().softmax(-1) - F.one_hot(y, widths[-1])) * weight[..., None]
    slopes: list[Tensor] = []
    for w, a in zip(reversed(weights), reversed(outputs), strict=True):
        slopes = [(a.mT @ back).flatten(1), back.sum(1), *slopes]
        back = (back @ w.mT) * (a > 0)
    return torch.cat(slopes, 1)
