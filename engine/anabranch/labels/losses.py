"""Losses for labels of which some are wrong, sample by sample."""

import math

import torch
from torch import Tensor

from anabranch.labels.softmax import softmax

LEAST = 1e-4  # stands for zero in the logarithm of a one-hot label
CLOSE = 1e-4  # how near to 0 and 1 predictions are taken to be where one minus them is in a logarithm


def reverse_cross_entropy(cross_entropy: Tensor) -> Tensor:
    """-sum_c p_c log q_c of a one-hot label q whose zeros are 1e-4, from -log p_y: 9.2103 (1 - p_y), which is bounded.

    Symmetric cross-entropy, arXiv 1908.06112.
    """
    return math.log(LEAST) * torch.expm1(-cross_entropy)


def uniform_prior(mean: Tensor) -> Tensor:
    """-sum_c log(m_c) / C of mean predictions m [..., C]: least, log C, where each class is predicted as often.

    KL(uniform || m) and a constant. Joint optimisation, arXiv 1803.11364.
    """
    return -mean.clamp_min(torch.finfo(mean.dtype).tiny).log().mean(-1)


def early_learning(logits: Tensor, past: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """log(1 - <p, t>), which falls as p agrees with t, what was predicted so far. ELR, arXiv 2007.00151.

    logits   [..., C]
    past     [..., C]  t before this prediction; zeros at first
    returns  [...] and t = momentum past + (1 - momentum) p [..., C], through which no slope goes
    """
    p = softmax(logits).clamp(CLOSE, 1 - CLOSE)
    seen = p.detach()
    targets = momentum * past + (1 - momentum) * seen / seen.sum(-1, keepdim=True)
    return torch.log1p(-(p * targets).sum(-1)), targets
