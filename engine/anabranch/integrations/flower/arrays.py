"""Flower's arrays as rows of a matrix, and back. What clients send is measured before it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HEADER_BYTES = 1024  # of NumPy's format, at most
TENSORS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def read_array(array: Any, like: np.ndarray) -> np.ndarray:
    """A client's `flwr.app.Array` as NumPy's, of the shape of `like` and of its kind: any float, or the same integer.

    Nothing larger than `like` in float64 is ever allocated, whatever the header claims; nothing is unpickled. Raises
    ValueError that says what came.
    """
    header = _header(array)
    dtype = header.dtype
    fits = dtype.kind == "f" and dtype.itemsize <= 8 if like.dtype.kind == "f" else dtype == like.dtype
    if header.shape != like.shape or not fits:
        raise ValueError(f"{dtype} {list(header.shape)}, wanted {like.dtype} {list(like.shape)}")
    return _body(array, header)


def read_record(record: Mapping[str, Any], like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of an ArrayRecord, which has to have the names of `like`. ValueError names what is wrong."""
    if set(record) != set(like):
        missing, more = sorted(set(like) - set(record)), sorted(set(record) - set(like))
        raise ValueError(f"missing arrays {missing}, unknown arrays {more}"[:200])
    arrays = {}
    for name in like:
        try:
            arrays[name] = read_array(record[name], like[name])
        except ValueError as error:
            raise ValueError(f"array {name!r}: {error}"[:200]) from error
    return arrays


def read_tensor(array: Any) -> Tensor:
    """An Array of any shape and of a dtype that tensors have, on memory of its own, as much as came.

    Raises ValueError that says what came.
    """
    header = _header(array)
    if header.dtype.name not in TENSORS or not header.dtype.isnative:
        raise ValueError(f"{header.dtype}, wanted one of {list(TENSORS)}")
    return torch.from_numpy(_body(array, header).copy())


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    length: int


def _header(array: Any) -> _Header:
    if array.stype != "numpy.ndarray":
        raise ValueError(f"serialised as {array.stype!r}")
    stream = BytesIO(array.data[:HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        header = read_header(stream, max_header_size=HEADER_BYTES)
    except Exception as error:  # NumPy parses the header as Python text: of hostile text anything may come
        raise ValueError(f"not in NumPy's format: {type(error).__name__}") from error
    return _Header(*header, stream.tell())


def _body(array: Any, header: _Header) -> np.ndarray:
    body = memoryview(array.data)[header.length :]
    if len(body) != prod(header.shape) * header.dtype.itemsize:
        raise ValueError(f"{len(body)} bytes of {header.dtype} {list(header.shape)}")
    return np.frombuffer(body, header.dtype).reshape(header.shape, order="F" if header.fortran else "C")


@dataclass(frozen=True, slots=True)
class Sent:
    """The arrays that a round began with. Floats make one vector [D]; what is not floats (counters) stays apart."""

    arrays: Mapping[str, np.ndarray]

    @property
    def floats(self) -> list[str]:
        return [name for name, array in self.arrays.items() if array.dtype.kind == "f"]

    @property
    def others(self) -> list[str]:
        return [name for name, array in self.arrays.items() if array.dtype.kind != "f"]

    @property
    def dtype(self) -> torch.dtype:
        """Of updates: float64 if any array is, float32 otherwise."""
        wide = any(self.arrays[name].dtype.itemsize > 4 for name in self.floats)
        return torch.float64 if wide else torch.float32

    def slices(self) -> dict[str, slice]:
        """Where each array of floats lies in the vector."""
        ends = np.cumsum([0, *(self.arrays[name].size for name in self.floats)]).tolist()
        return {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.floats)}

    def vector(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """The floats of such arrays [D]."""
        out = torch.empty(sum(self.arrays[name].size for name in self.floats), dtype=self.dtype)
        for name, part in self.slices().items():
            out.numpy()[part] = arrays[name].ravel()  # converts on the way
        return out

    def moved(self, update: Tensor, others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays after an update [D], in their order, shapes and dtypes. Raises ValueError where one overflows."""
        moved = dict(others)
        for name, part in self.slices().items():
            before = self.arrays[name]
            wide = before.astype(update.numpy().dtype).ravel() + update.numpy()[part]
            with np.errstate(over="ignore"):
                moved[name] = wide.astype(before.dtype).reshape(before.shape)
            if not np.isfinite(moved[name]).all():
                raise ValueError(f"the sum of {name!r} and its update is not finite")
        return {name: moved[name] for name in self.arrays}
