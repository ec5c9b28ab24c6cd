"""Coordinate-wise rules on the CPU: C++ (csrc/coordinate_rules.cpp), torch for float64.

Layout   tiles of up to 512 columns of all rows are copied side by side; a vector of columns is sorted at a time.
Bound    memory up to 32 rows, from there on the log^2 N exchanges for each value.
Numerics as the reference, bit for bit but for float64's rounding of sums; the number of threads changes nothing.
Not here float64 rows: they go to the reference, on purpose; what federates and merges is float32 or shorter.
"""

import torch
from torch import Tensor

from ..memory import prefer_huge_pages
from ..native import ISA, TYPES, extension
from . import reference


def coordinate_rule(points: Tensor, rule: int, f: int, isa: str = ISA) -> Tensor:
    if points.dtype == torch.float64:
        return reference.coordinate_rule(points, rule, f)
    points = points if points.stride(2) == 1 else points.contiguous()
    B, N, D = points.shape
    out = prefer_huge_pages(points.new_empty(B, D))
    rows = (points.data_ptr(), TYPES[points.dtype], points.stride(0), points.stride(1))
    if not extension.coordinate_rule(rows, out.data_ptr(), rule, f, B, N, D, isa, torch.get_num_threads()):
        reference.refuse_nan(points)
    return out
