"""Secret sharing of long vectors: fixed point, noise, encoding, weighted sums of shares, decoding, projections.

    elements = quantise(x, field, FixedPoint(clip=1.0, fraction_bits=20))        [D]
    values   = concatenation of data in K blocks and T blocks of noise           [K + T, L]
    shares   = encode(values, code)                                              [N, L], row j for client j
    sums     = multiply(weights, shares of many owners)                          [1, L], by each client
    blocks   = decode(sums of any K + T clients, clients, code)                  [K, L]

All integers are canonical elements of one field (fields.py); the code's points and matrices are in code.py. Every
result is exact, and the same to the last bit on every device.
"""

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from ..library import define
from ..tensors import described
from . import cpu, reference
from .code import Code, decoding_matrix, encoding_matrix
from .fields import BABYBEAR, F50, FIELDS, GOLDILOCKS, KOALABEAR, M31, Field, FixedPoint

__all__ = [
    "BABYBEAR", "F50", "FIELDS", "GOLDILOCKS", "KOALABEAR", "M31", "Code", "Field", "FixedPoint",
    "accept", "decode", "dequantise", "encode", "is_canonical", "multiply", "quantise",
]  # fmt: skip

_quantise = define(
    "field_quantise(Tensor x, Tensor? dither, str field, float clip, int fraction_bits) -> (Tensor, Tensor)",
    reference=reference.quantise,
    cpu=cpu.quantise,
    cuda=lambda *args: import_module(".gpu", __package__).quantise(*args),  # Triton loads on first use
    fake=lambda x, dither, field, clip, fraction_bits: (
        x.new_empty(x.shape, dtype=FIELDS[field].dtype),
        x.new_empty(2, dtype=torch.int64),
    ),
)

_dequantise = define(
    "field_dequantise(Tensor x, str field, float divisor) -> Tensor",
    reference=reference.dequantise,
    cpu=cpu.dequantise,
    cuda=lambda *args: import_module(".gpu", __package__).dequantise(*args),
    fake=lambda x, field, divisor: x.new_empty(x.shape, dtype=torch.float64),
)

_accept = define(
    "field_accept(Tensor stream, str field) -> Tensor",
    reference=reference.accept,
    cpu=cpu.accept,
    cuda=lambda *args: import_module(".gpu", __package__).accept(*args),
    fake=lambda stream, field: stream.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=FIELDS[field].dtype),
)

_transform = define(
    "field_transform(Tensor values, int clients, int order, int coset_order, str field) -> Tensor",
    reference=reference.transform,
    cpu=cpu.transform,
    cuda=lambda *args: import_module(".gpu", __package__).transform(*args),
    fake=lambda values, clients, order, coset_order, field: values.new_empty(clients, values.shape[1]),
)

_multiply = define(
    "field_multiply(Tensor matrix, Tensor x, str field) -> Tensor",
    reference=reference.multiply,
    cpu=cpu.multiply,
    cuda=lambda *args: import_module(".gpu", __package__).multiply(*args),
    fake=lambda matrix, x, field: x.new_empty(matrix.shape[0], x.shape[1]),
)


def quantise(x: Tensor, field: Field, fixed_point: FixedPoint, *, dither: Tensor | None = None) -> tuple[Tensor, int]:
    """Real numbers as elements of the field, and how many had to be clipped.

    x        any shape; float64, float32, bfloat16 or float16
    dither   float64 of that shape, uniform in [0, 1): rounding becomes floor(x * 2^fraction_bits + dither), which is
             unbiased; None rounds to the nearest, half to even
    returns  elements of that shape, field.dtype: v as v, -v as p - v; the number of clipped ones

    Raises ValueError for other dtypes, for NaN and Inf, and if `fixed_point` makes integers above (p - 1) / 2.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if dither is not None and (dither.shape != x.shape or dither.dtype != torch.float64 or dither.device != x.device):
        raise ValueError(f"dither must be {list(x.shape)} float64 on {x.device}, got {described(dither)}")
    fixed_point.check_budget(field, 1)
    out, counts = _quantise(x, dither, field.name, fixed_point.clip, fixed_point.fraction_bits)
    clipped, not_finite = counts.tolist()
    if not_finite:
        raise ValueError(f"{not_finite} of {x.numel()} numbers are not finite")
    return out, clipped


def dequantise(elements: Tensor, field: Field, fixed_point: FixedPoint, *, total_weight: int = 1) -> Tensor:
    """Elements above (p - 1) / 2 as negative numbers, divided by total_weight * 2^fraction_bits, in float64.

    total_weight  of the owners in a weighted sum; their mean is returned
    """
    _check(elements, field, "elements")
    out: Tensor = _dequantise(elements, field.name, float(total_weight) * 2.0**fixed_point.fraction_bits)
    return out


def accept(stream: Tensor, field: Field) -> Tensor:
    """Uniform elements from uniform bytes, by rejection: all words of the stream that are below p once masked.

    stream   [S] uint8, S a multiple of field.bytes: the output of a stream cipher whose key is secret. Words are
             little-endian and masked to field.bits bits
    returns  [n] field.dtype, n <= S / field.bytes: the accepted words in their order

    93.75 % of BabyBear's words are accepted, 99.2 % of KoalaBear's, nearly all of the other fields'.
    """
    if stream.ndim != 1 or stream.dtype != torch.uint8 or stream.shape[0] % field.bytes:
        raise ValueError(f"stream must be [S] uint8, S a multiple of {field.bytes}, got {described(stream)}")
    out: Tensor = _accept(stream, field.name)
    return out


def multiply(matrix: Tensor, x: Tensor, field: Field) -> Tensor:
    """Matrix [M, U] times x [U, L] modulo p: [M, L], elements of the field throughout.

    Weighted sums of shares are the case M = 1; projections of long rows on C random ones the case of large U, L = C.
    """
    _check(matrix, field, "matrix", ndim=2)
    _check(x, field, "x", ndim=2)
    if matrix.shape[1] != x.shape[0] or matrix.device != x.device:
        raise ValueError(f"cannot multiply {described(matrix)} by {described(x)}")
    out: Tensor = _multiply(matrix, x, field.name)
    return out


def encode(values: Tensor, code: Code, *, method: str | None = None) -> Tensor:
    """The shares of all clients.

    values   [K + T, L]  K blocks of data, then T blocks of uniform noise, elements of code.field
    method   "dense": a matrix product; "transform": number-theoretic transforms, where code.has_transform; None: the
             faster for these sizes. The bits are the same
    returns  [N, L]      row j for client j
    """
    _check(values, code.field, "values", ndim=2)
    if values.shape[0] != code.threshold:
        raise ValueError(f"values must be [K + T = {code.threshold}, L], got {described(values)}")
    if method not in (None, "dense", "transform"):
        raise ValueError(f"method must be 'dense', 'transform' or None, got {method!r}")
    if method == "transform" and not code.has_transform:
        raise ValueError(f"field {code.field.name} has no transform for N={code.clients}, U={code.threshold}")
    if method is None and code.has_transform and values.device.type == "cpu":
        sizes = (code.clients, code.threshold, code.order, code.coset_order)
        method = "transform" if cpu.prefers_transform(*sizes) else "dense"
    if method == "transform":
        out: Tensor = _transform(values, code.clients, code.order, code.coset_order, code.field.name)
        return out
    return multiply(matrix_of(encoding_matrix(code), code.field, values.device), values, code.field)


def decode(shares: Tensor, clients: Sequence[int], code: Code) -> Tensor:
    """The K blocks of data [K, L] from the shares [K + T, L] of these clients, in their order.

    Raises ValueError if these are not K + T different clients. Wrong shares make a wrong result: see code.correct.
    """
    _check(shares, code.field, "shares", ndim=2)
    return multiply(matrix_of(decoding_matrix(code, clients), code.field, shares.device), shares, code.field)


def is_canonical(elements: Tensor, field: Field) -> bool:
    """Whether all are in 0..p - 1; what comes from outside must be asked."""
    _check(elements, field, "elements")
    if not elements.numel():
        return True
    if field.p >= 2**63:  # as signed numbers those from p on are the last below zero
        return not bool(((elements < 0) & (elements >= field.p - 2**64)).any())
    least, largest = elements.aminmax()
    return int(least) >= 0 and int(largest) < field.p


def matrix_of(rows: Sequence[Sequence[int]], field: Field, device: torch.device) -> Tensor:
    """Python integers as a matrix of elements."""
    unsigned = np.array(rows, dtype=np.uint64)
    signed = unsigned.view(np.int64) if field.bytes == 8 else unsigned.astype(np.int32)
    return torch.from_numpy(signed).to(device)


def _check(x: Tensor, field: Field, name: str, ndim: int | None = None) -> None:
    if x.dtype != field.dtype or (ndim is not None and x.ndim != ndim):
        shape = "" if ndim is None else f"{ndim}-dimensional "
        raise ValueError(f"{name} must be {shape}{field.dtype} elements of {field.name}, got {described(x)}")
