"""Products of centred rows and a sum of them on the CPU: C++ (csrc/geometric_median.cpp), torch for float64.

Layout   tiles of 512 columns of all rows are copied side by side, centred; blocks of 4 rows meet 4 in registers. With
         AMX, from 16 rows on, exact parts of them in bfloat16 meet in its tiles (csrc/gram_tiles.h).
Bound    memory for few rows, arithmetic from about 32 on: N / 2 multiply-adds for each element read.
Numerics products and sums of a tile in float32, tiles in float64; a row whose squares would leave float32's range is
         scaled by a power of two. The bits depend on the sizes alone, not on the number of threads.
Not here float64 rows: they go to the reference, on purpose; what federates and merges is float32 or shorter.
"""

import torch
from torch import Tensor

from ..memory import prefer_huge_pages
from ..native import ISA, TYPES, extension
from ..tensors import dense_rows
from . import reference


def centred_gram(points: Tensor, centre: Tensor | None, isa: str = ISA) -> Tensor:
    if points.dtype == torch.float64:
        return reference.centred_gram(points, centre)
    points, centre = dense_rows(points), None if centre is None else dense_rows(centre)
    B, N, D = points.shape
    gram = points.new_empty(B, N, N, dtype=torch.float64)
    extension.centred_gram(_rows(points), _place(centre), gram.data_ptr(), B, N, D, isa, torch.get_num_threads())
    return gram


def combine(points: Tensor, coefficients: Tensor, centre: Tensor | None, isa: str = ISA) -> Tensor:
    if points.dtype == torch.float64:
        return reference.combine(points, coefficients, centre)
    points, centre = dense_rows(points), None if centre is None else dense_rows(centre)
    coefficients = coefficients.contiguous()
    B, N, D = points.shape
    out = prefer_huge_pages(points.new_empty(B, D))
    extension.combine(
        _rows(points), coefficients.data_ptr(), _place(centre), out.data_ptr(), B, N, D, isa, torch.get_num_threads()
    )
    return out


def _rows(points: Tensor) -> tuple[int, ...]:
    return (points.data_ptr(), TYPES[points.dtype], points.stride(0), points.stride(1))


def _place(centre: Tensor | None) -> tuple[int, int]:
    return (0, 0) if centre is None else (centre.data_ptr(), centre.stride(0))
