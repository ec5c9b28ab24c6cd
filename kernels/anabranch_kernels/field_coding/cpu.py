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
from ..tensors import dense_rows
from .fields import FIELDS

_FIELDS = {"babybear": 0, "koalabear": 1, "m31": 2, "goldilocks": 3, "f50": 4}  # csrc/field.h, enum Field
_REALS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/field_coding.h, enum Real
ISAS: tuple[str, ...] = tuple(extension.supported_field_isas())  # slowest first
ISA = ISAS[-1]
_FEW = 16  # columns of x, with so many rows at least: lanes go along the rows of x

# Products of a dense encoding that take as long as a butterfly of a transform: `anabranch bench field-coding`.
_BUTTERFLY = {"generic": 5, "avx2": 4, "avx512": 4, "avx512_ifma": 8}


def prefers_transform(clients: int, threshold: int, order: int, coset_order: int, isa: str = ISA) -> bool:
    """Whether a transform makes these shares faster than a matrix product: from about 32 clients on, with IFMA 128."""
    butterflies = sum(n // 2 * (n.bit_length() - 1) for n in (order, coset_order)) + order
    return clients * threshold >= _BUTTERFLY[isa] * butterflies


def multiply(matrix: Tensor, x: Tensor, field: str, isa: str = ISA) -> Tensor:
    M, U = matrix.shape
    L = x.shape[1]
    if _FEW >= L and U >= 16 * L:
        matrix, x = dense_rows(matrix), dense_rows(x.T).T
    else:
        x = dense_rows(x)
    out = prefer_huge_pages(x.new_empty(M, L))
    sizes = (M, U, L)
    extension.field_multiply(
        _FIELDS[field], _place(matrix), _place(x), out.data_ptr(), sizes, isa, torch.get_num_threads()
    )
    return out


def transform(values: Tensor, clients: int, order: int, coset_order: int, field: str, isa: str = ISA) -> Tensor:
    values = dense_rows(values)
    U, L = values.shape
    out = prefer_huge_pages(values.new_empty(clients, L))
    sizes = (U, clients, L, order, coset_order)
    extension.field_transform(
        _FIELDS[field], values.data_ptr(), values.stride(0), out.data_ptr(), sizes, isa, torch.get_num_threads()
    )
    return out


def quantise(
    x: Tensor, dither: Tensor | None, field: str, clip: float, fraction_bits: int, isa: str = ISA
) -> tuple[Tensor, Tensor]:
    x, dither = x.contiguous(), None if dither is None else dither.contiguous()
    out = prefer_huge_pages(torch.empty(x.shape, dtype=FIELDS[field].dtype))
    counts = extension.field_quantise(
        _FIELDS[field], x.data_ptr(), _REALS[x.dtype], 0 if dither is None else dither.data_ptr(), out.data_ptr(),
        x.numel(), clip, 2.0**fraction_bits, isa, torch.get_num_threads(),
    )  # fmt: skip
    return out, torch.tensor(counts)


def dequantise(x: Tensor, field: str, divisor: float, isa: str = ISA) -> Tensor:
    x = x.contiguous()
    out = prefer_huge_pages(torch.empty(x.shape, dtype=torch.float64))
    threads = torch.get_num_threads()
    extension.field_dequantise(_FIELDS[field], x.data_ptr(), out.data_ptr(), x.numel(), divisor, isa, threads)
    return out


def accept(stream: Tensor, field: str, isa: str = ISA) -> Tensor:
    stream = stream.contiguous()
    words = stream.numel() // FIELDS[field].bytes
    out = prefer_huge_pages(torch.empty(words, dtype=FIELDS[field].dtype))
    threads = torch.get_num_threads()
    count = extension.field_accept(_FIELDS[field], stream.data_ptr(), out.data_ptr(), words, isa, threads)
    return out[:count]


def _place(x: Tensor) -> tuple[int, int, int]:
    return (x.data_ptr(), x.stride(0), x.stride(1))
