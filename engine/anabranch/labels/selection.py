"""Small-loss selection: networks fit what is true before they fit what is wrong, so small losses mark clean labels."""

import math

import torch
from torch import Tensor

ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def forget_rate(time: int, *, rate: float, ramp: int) -> float:
    """Share of samples to leave out at a time from 0: it rises linearly from nothing and is `rate` from `ramp` on."""
    return rate * min(1.0, time / ramp) if ramp else rate


def small_losses(losses: Tensor, real: Tensor, forget: float) -> Tensor:
    """Which samples are kept when the share `forget` with the largest losses is left out.

    losses  [N, B]
    real    [N, B] bool   samples to choose among, others are never chosen
    forget  in [0, 1)     of n samples int(forget * n) are left out, so one that is alone stays
    returns [N, B] bool   of equal losses the first are kept
    """
    n = real.sum(1, keepdim=True)
    return smallest(losses, real, n - (forget * n.double() + ROUNDING).long())


def smallest(losses: Tensor, real: Tensor, wanted: Tensor) -> Tensor:
    """[N, B] bool: the `wanted` [N, 1] int64 of the smallest losses [N, B] among those that are real [N, B] bool."""
    order = losses.masked_fill(~real, math.inf).argsort(dim=1, stable=True)
    ranked = torch.arange(losses.shape[1]) < wanted
    # a loss that is no number is ranked behind those of the others, even behind those that are not real
    return torch.zeros_like(real).scatter(1, order, ranked) & real


def mean_of(chosen: Tensor) -> Tensor:
    """[N, B] float32: one over how many are chosen [N, B] bool, for those; sums of losses times these are means."""
    return chosen / chosen.sum(1, keepdim=True).clamp_min(1)
