"""Losses for labels of which some are wrong, sample by sample.

logits   [..., C]
y        [...] int64
returns  [...]
"""

import math

import torch
from torch import Tensor

LEAST = 1e-4  # stands for zero in the logarithm of a one-hot label
CLOSE = 1e-4  # how near to 0 and 1 predictions are taken to be where one minus them is in a logarithm


def reverse_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-sum_c p_c log q_c of a one-hot label q whose zeros are 1e-4: 9.2103 (1 - p_y), bounded and so robust.

    Symmetric cross-entropy, arXiv 1908.06112.
    """
    return -math.log(LEAST) * (1 - logits.softmax(-1).gather(-1, y[..., None]).squeeze(-1))


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c log p_c, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def uniform_prior(mean: Tensor) -> Tensor:
    """-sum_c log(m_c) / C of mean predictions m [..., C]: least, log C, where each class is predicted as often.

    KL(uniform || m) and a constant. Joint optimisation, arXiv 1803.11364.
    """
    return -mean.clamp_min(torch.finfo(mean.dtype).tiny).log().mean(-1)


def early_learning(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 - <p, t>), t [..., C] what was predicted so far: falls as p agrees with it. ELR, arXiv 2007.00151."""
    return torch.log1p(-(_inside(logits) * targets).sum(-1))


def early_targets(logits: Tensor, targets: Tensor, momentum: float) -> Tensor:
    """What was predicted so far, this prediction included: momentum t + (1 - momentum) p, no slope."""
    p = _inside(logits.detach())
    return momentum * targets + (1 - momentum) * p / p.sum(-1, keepdim=True)


def _inside(logits: Tensor) -> Tensor:
    return logits.softmax(-1).clamp(CLOSE, 1 - CLOSE)
