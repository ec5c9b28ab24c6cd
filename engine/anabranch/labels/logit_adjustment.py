"""Logit adjustment: a classifier that learns from few samples of a class need not come to expect few. arXiv 2007.07314

    loss = CE(z + tau log pi, y)        pi: the classes' shares of the labels; predictions use z alone

A class that is absent has log 0. It is given a least share instead, so small that it takes no visible part in the
softmax, but z + tau log pi stays finite and so does a divergence from it.
"""

import torch
from torch import Tensor

LEAST_SHARE = 1e-8  # below float32's resolution of one


def class_counts(y: Tensor, real: Tensor, classes: int) -> Tensor:
    """Samples of each class: y [N, n] int64, real [N, n] bool (which count) -> [N, C] int64."""
    return torch.zeros(len(y), classes, dtype=torch.int64).scatter_add_(1, y, real.long())


def log_prior(counts: Tensor) -> Tensor:
    """log pi of counts [N, C] int64, each row with some sample: [N, C] float32, finite."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    return shares.clamp_min(LEAST_SHARE).log().float()
