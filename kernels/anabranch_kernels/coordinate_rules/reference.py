"""The rules as their definitions read, on values that torch has sorted, some columns at a time.

Values are float32 (float64 for float64 points) with zeros made positive, and so are distances to a centre; sums are
float64. Every back-end keeps to that, so that all of them choose the same values.
"""

from enum import IntEnum

import torch
from torch import Tensor

COLUMNS = 1 << 14  # of all rows that are sorted together


class Rule(IntEnum):
    """As in csrc/coordinate_rules.h."""

    MEDIAN = 0
    TRIMMED_MEAN = 1
    MEAN_AROUND_MEDIAN = 2
    PHOCAS = 3
    SIGN_MAJORITY = 4


def coordinate_rule(points: Tensor, rule: int, f: int) -> Tensor:
    refuse_nan(points)
    B, _, D = points.shape
    out = points.new_empty(B, D)
    for rows, result in zip(points.split(COLUMNS, 2), out.split(COLUMNS, 1), strict=True):
        values = (rows if rows.dtype == torch.float64 else rows.float()) + 0.0
        result.copy_(_majority(values) if rule == Rule.SIGN_MAJORITY else _of_sorted(values.sort(1).values, rule, f))
    return out


def refuse_nan(points: Tensor) -> None:
    """ValueError names the first row with a NaN."""
    bad = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    for rows in points.split(COLUMNS, 2):
        bad |= rows.isnan().any(2)
    if bool(bad.any()):
        b, i = bad.nonzero()[0].tolist()
        raise ValueError(f"row {i} of problem {b} holds NaN ({int(bad.sum())} such rows in all), which has no order")


def _majority(values: Tensor) -> Tensor:
    return values.sign().sum(1).sign()


def _of_sorted(values: Tensor, rule: int, f: int) -> Tensor:
    if rule == Rule.MEDIAN:
        return _median(values)
    if rule == Rule.TRIMMED_MEAN:
        return _trimmed_mean(values, f)
    return _mean_around(_median(values) if rule == Rule.MEAN_AROUND_MEDIAN else _trimmed_mean(values, f), values, f)


def _median(values: Tensor) -> Tensor:
    N = values.shape[1]
    low, high = values[:, (N - 1) // 2], values[:, N // 2]
    middle = (low + high) / 2
    return torch.where(middle.isinf(), low / 2 + high / 2, middle)


def _trimmed_mean(values: Tensor, f: int) -> Tensor:
    return _mean(values[:, f : values.shape[1] - f])


def _mean_around(centre: Tensor, values: Tensor, f: int) -> Tensor:
    """Mean of the m = N - f values nearest to the centre: a window of m, moved up while it loses a farther one."""
    m = values.shape[1] - f
    lost, gained = values[:, :f], values[:, m:]
    moves = (centre[:, None] - lost > gained - centre[:, None]).sum(1, keepdim=True)
    window = moves + torch.arange(m, device=values.device)[:, None]
    return torch.where(centre.isfinite(), _mean(values.gather(1, window)), centre)


def _mean(values: Tensor) -> Tensor:
    wide = values if values.device.type == "mps" else values.double()  # Apple's GPUs have no float64
    return (wide.sum(1) / values.shape[1]).to(values.dtype)
