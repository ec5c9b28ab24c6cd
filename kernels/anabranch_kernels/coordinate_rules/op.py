"""Robust rules that work coordinate by coordinate: each number of the result depends on N numbers, and on their order.

One read of the points. What follows holds for all of them.

points   [B, N, D]  B problems of N points of D numbers; float64, float32, bfloat16 or float16
returns  [B, D]     dtype of points

The order of the points and the number of threads change no bit of the result; -0 counts as 0. Values are compared in
float32 (float64 for float64 points), sums are float64 and rounded once. Inf is a number above all others: where it
takes part in a mean the mean is Inf, beside -Inf it is NaN; rules that leave it out are as finite as the rest. NaN has
no order: ValueError names the row. So do shapes, dtypes and f that do not fit. There is no gradient.
"""

from importlib import import_module

import torch
from torch import Tensor

from ..library import define
from . import cpu, reference
from .reference import Rule

__all__ = ["coordinate_median", "mean_around_median", "phocas", "sign_majority", "trimmed_mean"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_op = define(
    "coordinate_rule(Tensor points, int rule, int f) -> Tensor",
    reference=reference.coordinate_rule,
    cpu=cpu.coordinate_rule,
    cuda=lambda *args: import_module(".gpu", __package__).coordinate_rule(*args),  # Triton loads on first use
    fake=lambda points, rule, f: points.new_empty(points.shape[0], points.shape[2]),
)


def coordinate_median(points: Tensor) -> Tensor:
    """Median of each coordinate; of an even number of points the mean of the middle two (arXiv 1803.01498)."""
    return _apply(points, Rule.MEDIAN, 0)


def trimmed_mean(points: Tensor, f: int) -> Tensor:
    """Mean of each coordinate without its f lowest and its f highest values, 2f < N (arXiv 1803.01498)."""
    return _apply(points, Rule.TRIMMED_MEAN, f)


def mean_around_median(points: Tensor, f: int) -> Tensor:
    """Mean of the N - f values of each coordinate that are nearest to its median, f < N (Meamed, arXiv 1802.10116).

    Of a lower and a higher value at the same distance the lower one counts as nearer. An infinite median is the result.
    Bulyan's second half is this over its theta selected rows with twice its f, so that theta - 2f values are averaged
    (arXiv 1802.07927).
    """
    return _apply(points, Rule.MEAN_AROUND_MEDIAN, f)


def phocas(points: Tensor, f: int) -> Tensor:
    """Mean of the N - f values of each coordinate nearest to its trimmed mean, 2f < N (Phocas, arXiv 1805.09682).

    Of a lower and a higher value at the same distance the lower one counts as nearer. An infinite trimmed mean is the
    result.
    """
    return _apply(points, Rule.PHOCAS, f)


def sign_majority(points: Tensor) -> Tensor:
    """Sign of the sum of the signs of each coordinate, -1, 0 or 1: signSGD's vote (arXiv 1810.05291)."""
    return _apply(points, Rule.SIGN_MAJORITY, 0)


def _apply(points: Tensor, rule: Rule, f: int) -> Tensor:
    if points.ndim != 3 or points.dtype not in DTYPES:
        raise ValueError(f"points must be [B, N, D] in one of {list(DTYPES)}, got {list(points.shape)} {points.dtype}")
    N = points.shape[1]
    if N == 0:
        raise ValueError(f"a rule needs points, got {list(points.shape)}")
    ends = 1 if rule is Rule.MEAN_AROUND_MEDIAN else 2
    if not 0 <= ends * f < N:
        raise ValueError(f"f must be at least 0 and {'2f' if ends == 2 else 'f'} < N, got {f=}, {N=}")
    out: Tensor = _op(points, int(rule), f)
    return out
