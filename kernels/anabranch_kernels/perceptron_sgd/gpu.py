"""SGD of perceptrons on the GPU: torch's batched products, all perceptrons at once.

Layout   rows as they are; a step is two products for each layer, and one more below the first.
Bound    memory for small ones: rows and velocities are read and written in every step.
Numerics float32; the order of sums is torch's.
Not here a kernel that keeps a row on its multiprocessor, as the CPU keeps it in a cache. Nobody trains federations on
         a GPU with this package yet.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
    n = index.shape[1]
    for begin in range(0, n, batch):
        some = slice(begin, min(begin + batch, n))
        sizes = (counts - begin).clamp(0, some.stop - begin)[:, None]
        real = torch.arange(some.stop - begin, device=rows.device) < sizes
        seen, told = (torch.where(real, of[:, some], 0) for of in (index, y))
        slope = _slope(rows, widths, x[seen], told, real / sizes.clamp_min(1))
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
