"""The optimiser of every training run: AdamW under a cosine, as pure functions of a step."""

import math

import torch
from torch import nn


def cosine_rate(step: int, *, steps: int, warmup: int, lr: float, final_lr: float) -> float:
    """Rate of a step counted from 0: a line up to `lr` over `warmup` steps, then half a cosine down to the last.

    final_lr    rate of the last step, as a share of `lr`
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    low = lr * final_lr
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimiser(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=True)
