"""An epoch of SGD on cross-entropy for many perceptrons at once, each on samples of its own."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..library import define
from . import cpu, gpu, reference

MOST_LAYERS = 16  # csrc/perceptron_sgd.h

_op = define(
    "perceptron_sgd(Tensor(a!) rows, Tensor(b!) velocity, Tensor x, Tensor index, Tensor y, Tensor counts,"
    " int[] widths, int batch, float lr, float momentum, float weight_decay) -> ()",
    reference=reference.perceptron_sgd,
    cpu=cpu.perceptron_sgd,
    cuda=gpu.perceptron_sgd,
    fake=lambda *args: None,
)


def perceptron_sgd(
    rows: Tensor,
    velocity: Tensor,
    x: Tensor,
    index: Tensor,
    y: Tensor,
    counts: Tensor,
    *,
    widths: Sequence[int],
    batch: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """Each of N perceptrons takes its samples in the order given, `batch` at a time, the last batch what is left.

        velocity = momentum * velocity + slope + weight_decay * row        row = row - lr * velocity

    slope being that of the mean cross-entropy over a batch. Hidden layers are rectified linear units.

    rows      [N, D] float32     trained in place: of each layer the weight [in, out], then the bias [out]
    velocity  [N, D] float32     zeros before the first step; in place
    x         [M, F] float32     samples of all
    index     [N, n] int64       which of these a perceptron takes, in this order
    y         [N, n] int64       their classes
    counts    [N] int64          how many entries of a row of `index` count; a perceptron with none stays as it is
    widths    (F, hidden..., C)  up to 16 layers; (F, C) is softmax regression

    Raises ValueError for shapes, dtypes or devices that do not fit and, on the CPU, for samples, classes or counts that
    do not exist; nothing is trained then.
    """
    check_rows(rows, velocity, widths, batch)
    for name, tensor, ndim, dtype in (
        ("x", x, 2, torch.float32), ("index", index, 2, torch.int64), ("y", y, 2, torch.int64),
        ("counts", counts, 1, torch.int64),
    ):  # fmt: skip
        _check(name, tensor, ndim, dtype, rows.device)
    N = len(rows)
    if x.shape[1] != widths[0] or index.shape != y.shape or len(index) != N or len(counts) != N:
        raise ValueError(
            f"x must be [M, {widths[0]}], index and y [{N}, n] and counts [{N}], got {list(x.shape)}, "
            f"{list(index.shape)}, {list(y.shape)} and {list(counts.shape)}"
        )
    if N and index.shape[1]:
        _op(rows, velocity, x, index, y, counts, list(widths), batch, lr, momentum, weight_decay)


def check_rows(rows: Tensor, velocity: Tensor, widths: Sequence[int], batch: int) -> None:
    """ValueError if these are not perceptrons that can be trained in place."""
    if not 1 < len(widths) <= MOST_LAYERS + 1 or min(widths) < 1:
        raise ValueError(f"widths must be 2 to {MOST_LAYERS + 1} positive numbers, got {list(widths)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    D = sum((a + 1) * b for a, b in pairwise(widths))
    for name, tensor in (("rows", rows), ("velocity", velocity)):
        _check(name, tensor, 2, torch.float32, rows.device)
        if tensor.shape != (len(rows), D) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {[len(rows), D]} for widths {list(widths)} and contiguous, since it is trained in "
                f"place; got {list(tensor.shape)} with strides {list(tensor.stride())}"
            )


def _check(name: str, tensor: Tensor, ndim: int, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.ndim != ndim or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must have {ndim} dimensions, {dtype}, on {device}, got {list(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )
