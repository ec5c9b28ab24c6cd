"""The same in Python's integers, element by element: slow, exact, the definition."""

import numpy as np
import torch
from torch import Tensor

from .fields import FIELDS, Field


def integers(x: Tensor) -> np.ndarray:
    """Elements as Python integers, in an array of objects of the same shape."""
    array = x.detach().cpu().numpy()
    return (array.view(np.uint64) if x.dtype == torch.int64 else array).astype(object)


def elements(values: np.ndarray, field: Field, device: torch.device) -> Tensor:
    """Python integers, reduced, as elements of the field."""
    reduced = np.asarray(values, dtype=object) % field.p
    unsigned = reduced.astype(np.uint64)
    signed = unsigned.view(np.int64) if field.dtype == torch.int64 else unsigned.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(signed)).to(device)


def multiply(matrix: Tensor, x: Tensor, field: str) -> Tensor:
    M, L = matrix.shape[0], x.shape[1]
    product = integers(matrix) @ integers(x) if x.shape[0] else np.zeros((M, L), dtype=object)
    return elements(product, FIELDS[field], x.device)


def transform(values: Tensor, clients: int, order: int, coset_order: int, field: str) -> Tensor:
    """The shares of the first points of the coset: interpolate at the subgroup of `order`, evaluate; naive sums."""
    f = FIELDS[field]
    root, inverse = pow(f.generator, (f.p - 1) // order, f.p), pow(order, -1, f.p)
    step = pow(f.generator, (f.p - 1) // coset_order, f.p)
    powers = [[pow(root, -m * k, f.p) * inverse % f.p for k in range(values.shape[0])] for m in range(order)]
    coefficients = np.array(powers, dtype=object) @ integers(values) % f.p
    alpha = [f.generator * pow(step, j, f.p) % f.p for j in range(clients)]
    evaluated = np.array([[pow(a, m, f.p) for m in range(order)] for a in alpha], dtype=object) @ coefficients
    return elements(evaluated, f, values.device)


def quantise(x: Tensor, dither: Tensor | None, field: str, clip: float, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """The elements, and two counts [2]: of numbers that were clipped, and of those that are not finite."""
    wide = x.detach().double().cpu()
    counts = torch.stack([(wide.abs() > clip).sum(), (~wide.isfinite()).sum()])
    scaled = wide.nan_to_num(0.0).clamp(-clip, clip) * 2.0**fraction_bits
    rounded = scaled.round() if dither is None else (scaled + dither.double().cpu()).floor()
    return elements(np.frompyfunc(int, 1, 1)(rounded.numpy()), FIELDS[field], x.device), counts.to(x.device)


def dequantise(x: Tensor, field: str, divisor: float) -> Tensor:
    p = FIELDS[field].p
    values = integers(x)
    signed = np.where(values > (p - 1) // 2, values - p, values)
    return torch.from_numpy((signed / divisor).astype(np.float64)).to(x.device)


def accept(stream: Tensor, field: str) -> Tensor:
    f = FIELDS[field]
    words = stream.detach().cpu().numpy().view(np.uint32 if f.bytes == 4 else np.uint64).astype(object)
    masked = words & ((1 << f.bits) - 1)
    return elements(masked[masked < f.p], f, stream.device)
