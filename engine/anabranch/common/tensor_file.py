"""Safetensors files by their bytes, for what is larger than memory: where tensors lie, and a file written in pieces."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.common.checkpoint import open_safetensors

# By their names in a header.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
WORD = 8  # bytes of the header's length, and what the header is filled up to

Write = Callable[[str, int, Tensor], None]


class Stored(NamedTuple):
    """A tensor in a file: its dtype by the header's name, its shape, and the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises FileNotFoundError, and ValueError for a file that is cut short or malformed: its own library checks it first.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    open_safetensors(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(WORD), "little")
        header = json.loads(file.read(size))
    metadata = header.pop(METADATA, {})
    start = WORD + size
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }, metadata


@contextmanager
def tensor_writer(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[Write]:
    """Write a safetensors file piece by piece: `write(name, begin, values)` puts [n] values at `begin` of a tensor.

    Tensors of wider dtypes come first, so that each lies at a multiple of its own size; apart from that in the order
    given. What is never written is zero. Values are put down by a thread while the next are made, and must stay as they
    are until then; what went wrong is raised by the next call, or in the end.
    """
    header: dict[str, object] = {METADATA: dict(metadata)}
    places, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        places[name], begin, end = end, end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % WORD)
    start = WORD + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(WORD, "little") + text)
        file.truncate(start + end)
        file.flush()

        def put(left: memoryview, offset: int) -> None:
            while left:
                written = os.pwrite(file.fileno(), left, offset)
                left, offset = left[written:], offset + written

        with ThreadPoolExecutor(1, "write-behind") as writer:
            pending: list[Future[None]] = []

            def write(name: str, begin: int, values: Tensor) -> None:
                offset = start + places[name] + begin * values.element_size()
                pending.append(writer.submit(put, values.contiguous().view(torch.uint8).numpy().data, offset))
                if len(pending) > 1:
                    pending.pop(0).result()

            yield write
            for last in pending:
                last.result()
