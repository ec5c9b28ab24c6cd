"""Products of centred rows and a sum of them, in float64 as the formulas read, some columns at a time."""

import torch
from torch import Tensor

from ..tensors import wide

COLUMNS = 1 << 16  # of all rows that are held in float64 together


def finite_centre(points: Tensor, centre: Tensor | None) -> Tensor:
    """The centre [B, D]; zero where it is not finite, or if it is None."""
    if centre is None:
        return points.new_zeros(1, 1).expand(points.shape[0], points.shape[2])
    return centre.nan_to_num(0.0, 0.0, 0.0)


def centred_gram(points: Tensor, centre: Tensor | None) -> Tensor:
    B, N, _ = points.shape
    gram = wide(points.new_zeros(B, N, N))
    zero = finite_centre(points, centre)
    for rows, middle in zip(points.split(COLUMNS, 2), zero.split(COLUMNS, 1), strict=True):
        differences = wide(rows) - wide(middle)[:, None]
        gram += differences @ differences.mT
    return gram


def combine(points: Tensor, coefficients: Tensor, centre: Tensor | None) -> Tensor:
    B, _, D = points.shape
    out = points.new_empty(B, D)
    zero = finite_centre(points, centre)
    parts = zip(points.split(COLUMNS, 2), zero.split(COLUMNS, 1), out.split(COLUMNS, 1), strict=True)
    factors = wide(coefficients)[:, :, None]
    for rows, middle, result in parts:
        differences = wide(rows) - wide(middle)[:, None]
        terms = torch.where(factors == 0, 0.0, factors * differences)  # a row of no weight may hold anything
        result.copy_(wide(middle) + terms.sum(1))
    alone = (coefficients == 1) & ((coefficients != 0).sum(1, keepdim=True) == 1)
    row = points[torch.arange(B, device=points.device), alone.to(torch.int8).argmax(1)]
    return torch.where(alone.any(1)[:, None], row, out)
