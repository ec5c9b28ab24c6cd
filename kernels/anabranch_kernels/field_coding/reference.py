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


def quantise(x: Tensor, dither: Tensor | None, field: str, clip: float, fraction_bits: int) -> tuple[Tensor, Tensor]:
    wide = x.detach().double().cpu()
    clipped = (wide.abs() > clip).sum()
    scaled = wide.clamp(-clip, clip) * 2.0**fraction_bits
    rounded = scaled.round() if dither is None else (scaled + dither.double().cpu()).floor()
    return elements(np.frompyfunc(int, 1, 1)(rounded.numpy()), FIELDS[field], x.device), clipped.to(x.device)


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
