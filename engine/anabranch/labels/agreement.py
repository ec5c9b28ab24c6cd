"""What a network said of a sample again and again: its mode, and how much it wavered. SELFIE, ICML 2019."""

import math

import torch
from torch import Tensor


def agreement(predicted: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mode of q predictions and their entropy over log C, 0 where all are one and 1 where none is preferred.

    predicted  [..., q] integers in [0, classes)
    returns    [...] int64, of equally frequent ones the least; [...] float32
    """
    counts = torch.zeros(*predicted.shape[:-1], classes)
    counts.scatter_add_(-1, predicted.long(), torch.ones(predicted.shape))
    shares = counts / predicted.shape[-1]
    return counts.argmax(-1), -torch.xlogy(shares, shares).sum(-1) / math.log(max(2, classes))
