"""Coding over finite fields on a GPU: which kernel multiplies what. The plans are in the gpu_*.py beside.

There is no transform: by count (gpu_multiply.py) the tensor cores multiply by the whole matrix faster up to N = 128 and
lose at most a quarter at 256. So a GPU transforms by the product with the same matrix.
"""

import numpy as np
import torch
from torch import Tensor

from ..launch import on_its_device
from .code import Code, encoding_matrix
from .fields import FIELDS
from .gpu_convert import accept as _accept
from .gpu_convert import dequantise as _dequantise
from .gpu_convert import quantise as _quantise
from .gpu_multiply import MOST
from .gpu_multiply import multiply as _multiply
from .gpu_project import project
from .reference import elements

LONG, NARROW = 1024, 16  # so many terms, so few columns: the tiles of gpu_multiply would leave the GPU idle
LIMIT = 2**31 - 1024  # columns and terms are counted in 32 bits

quantise, dequantise, accept = on_its_device(_quantise), on_its_device(_dequantise), on_its_device(_accept)


@on_its_device
def multiply(matrix: Tensor, x: Tensor, field: str) -> Tensor:
    (M, U), L = matrix.shape, x.shape[1]
    if 0 in (M, U, L):
        return x.new_zeros(M, L)
    if max(U, L) >= LIMIT:
        raise ValueError(f"a GPU multiplies [M, U] by [U, L] for U and L below {LIMIT}, got {U=}, {L=}")
    f = FIELDS[field]
    if L <= NARROW and U >= LONG:
        parts = project(matrix, x, f)
    elif U > MOST:
        cuts = zip(matrix.split(MOST, 1), x.split(MOST), strict=True)
        parts = torch.stack([_multiply(left, right, f) for left, right in cuts])
    else:
        return _multiply(matrix, x, f)
    if len(parts) == 1:
        return parts[0]
    return multiply(parts.new_ones(1, len(parts)), parts.flatten(1), field).view(M, L)


def transform(values: Tensor, clients: int, order: int, coset_order: int, field: str) -> Tensor:
    f = FIELDS[field]
    code = Code(field=f, clients=clients, blocks=values.shape[0] - 1, privacy=1)  # which are noise does not matter here
    assert (code.order, code.coset_order) == (order, coset_order)
    return multiply(elements(np.array(encoding_matrix(code), dtype=object), f, values.device), values, field)
