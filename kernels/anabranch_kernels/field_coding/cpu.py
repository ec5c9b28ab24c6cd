"""Arithmetic on long rows of field elements on the CPU: C++ (csrc/field_coding.cpp).

Layout   lanes are columns; a block of rows of the matrix meets a vector of columns in registers. Sums over thousands of
         places for a few columns (projections) have lanes along the sum instead.
Bound    arithmetic for matrices of 8 rows or more, memory for fewer and for projections.
Numerics exact: sums are wider than the products in them, and are reduced before they could overflow. No branch and no
         address depends on an element; only `accept` shows which words it refused, which says nothing of the others.
"""

import torch
from torch import Tensor

from ..memory import prefer_huge_pages
from ..native import extension

# csrc/field.h, enum Field
_FIELDS = {"babybear": 0, "koalabear": 1, "m31": 2, "goldilocks": 3, "f50": 4}
ISA: str = extension.supported_field_isas()[-1]
_FEW = 16  # columns of x, with so many rows at least: lanes go along the rows of x


def multiply(matrix: Tensor, x: Tensor, field: str, isa: str = ISA) -> Tensor:
    M, U = matrix.shape
    L = x.shape[1]
    if _FEW >= L and U >= 16 * L:
        matrix, x = _dense_rows(matrix), _dense_rows(x.T).T
    else:
        x = _dense_rows(x)
    out = prefer_huge_pages(x.new_empty(M, L))
    sizes = (M, U, L)
    extension.field_multiply(
        _FIELDS[field], _place(matrix), _place(x), out.data_ptr(), sizes, isa, torch.get_num_threads()
    )
    return out


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[int, int, int]:
    return (x.data_ptr(), x.stride(0), x.stride(1))
