"""SGD of perceptrons on the CPU: C++ (csrc/perceptron_sgd.cpp).

Layout   a perceptron's weights and velocities are copied into panels of two vectors of columns, trained there for the
         whole epoch, and copied back; one thread trains one perceptron.
Bound    arithmetic: 6 operations for each weight and sample, of which the first layer's way back needs none; a step
         itself, two numbers read and written for each weight, takes a tenth to a quarter of the time.
Numerics float32 sums in a fixed order; the number of threads changes no bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..native import ISA, extension


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
    isa: str = ISA,
) -> None:
    x, index, y, counts = (tensor.contiguous() for tensor in (x, index, y, counts))
    extension.perceptron_sgd(
        tuple(widths), rows.data_ptr(), velocity.data_ptr(), x.data_ptr(), index.data_ptr(), y.data_ptr(),
        counts.data_ptr(), (len(rows), len(x), index.shape[1]), min(batch, index.shape[1]),
        (lr, momentum, weight_decay), isa, torch.get_num_threads(),
    )  # fmt: skip


def load_steps(
    rows: Tensor, velocity: Tensor, widths: Sequence[int], batch: int, isa: str | None
) -> tuple[Any, Tensor]:
    """The kernel's steps, and the memory in which rows and velocities are trained, which must live as long."""
    steps = extension.PerceptronSteps(tuple(widths), batch, len(rows), isa or ISA)
    states = rows.new_empty(len(rows), steps.floats)
    steps.load(states.data_ptr(), rows.data_ptr(), velocity.data_ptr(), torch.get_num_threads())
    return steps, states
