"""Clients' updates in safetensors files, read tile by tile while the tile before is computed with.

Files are read, not mapped: four tiles are all that stays in this process, whatever the files' size, and a mapped page
costs more than a copied one. Two threads read, by turns: one alone copies slower than two cores can add up.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate.sources import Chosen, Entry, Tile, check_same, pieces, tile_columns
from anabranch.common.checkpoint import weight_files
from anabranch.common.tensor_file import DTYPES, read_header
from anabranch_kernels.memory import prefer_huge_pages

READERS = 2  # threads
AHEAD = READERS + 1  # tiles being read or waiting: with one for each, readers would wait to be told to go on
LINE = 64  # bytes of a cache line


class _Place(NamedTuple):
    path: Path
    offset: int


class SafetensorsFiles:
    """Clients that are safetensors files, or folders with model.safetensors, one file or shards with their index.

    metadata  what all clients' metadata agree on
    paths     of all files
    Raises FileNotFoundError, and ValueError for files that cannot be read, that differ in names, shapes or dtypes, or
    hold a dtype that is neither a float of 16 to 64 bits, an integer nor a boolean. A sweep holds two files per client
    open at a time.
    """

    def __init__(self, clients: Sequence[Path], base: Path | None = None) -> None:
        if not clients:
            raise ValueError("there is nothing to aggregate: no files were given")
        same = [str(path) for i, path in enumerate(clients) if path.resolve() in {p.resolve() for p in clients[:i]}]
        if same:
            raise ValueError(f"given more than once: {', '.join(same)}; weights let a client count more than others")
        self.clients = [str(path) for path in clients]
        self.has_base = base is not None
        self.paths: set[Path] = set()
        self.metadata: dict[str, str] = {}
        self._places: list[dict[str, _Place]] = []
        self.entries: list[Entry] = []
        for index, client in enumerate([*clients, *([] if base is None else [base])]):
            found, metadata = self._add(client)
            if index == 0:
                places = self._places[0]
                # As the first client stores them, so that its file is read from front to end.
                self.entries = sorted(found.values(), key=lambda entry: places[entry.name])
                self.metadata = metadata
            check_same({e.name: e for e in self.entries}, found, self.clients[0], str(client))
            if index < len(clients):
                self.metadata = {k: v for k, v in self.metadata.items() if metadata.get(k) == v}

    def _add(self, client: Path) -> tuple[dict[str, Entry], dict[str, str]]:
        """Read the headers of one client's files."""
        places: dict[str, _Place] = {}
        found: dict[str, Entry] = {}
        common: dict[str, str] = {}
        for path in weight_files(client) if client.is_dir() else [client]:
            tensors, metadata = read_header(path)
            for name, stored in tensors.items():
                if stored.dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is {stored.dtype}; what can be aggregated is {sorted(DTYPES)}")
                if name in found:
                    raise ValueError(f"{path}: {name} is in {places[name].path} too")
                places[name] = _Place(path, stored.offset)
                found[name] = Entry(name, DTYPES[stored.dtype], stored.shape)
            common |= metadata
            self.paths.add(path.resolve())
        self._places.append(places)
        return found, common

    def tiles(self, chosen: Chosen, *, base: bool) -> Iterator[Tile]:
        plan = list(pieces(self.entries, len(self.clients), chosen))
        most = self._largest_tile()
        buffers = [prefer_huge_pages(torch.empty(most, dtype=torch.uint8)) for _ in range(AHEAD + 1)]
        also = [len(self.clients)] if base and self.has_base else []
        opened = [_Files() for _ in range(READERS)]

        def read(number: int) -> Tile:
            index, begin, end = plan[number]
            name, dtype, _ = self.entries[index]
            n, clients = len(chosen[index] or ()), [*(chosen[index] or ()), *also]
            files = opened[number % READERS]
            files.turn_to(name, {client: self._places[client][name] for client in clients})
            buffer, pitch = buffers[number % (AHEAD + 1)], _pitch(end - begin, dtype)
            files.read(begin * dtype.itemsize, (end - begin) * dtype.itemsize, buffer.numpy().data, pitch)
            rows = buffer[: len(clients) * pitch].view(dtype).view(len(clients), pitch // dtype.itemsize)
            rows = rows[:, : end - begin]
            return Tile(index, begin, rows[:n], rows[n] if also else None)

        with ExitStack() as stack:
            for files in opened:
                stack.enter_context(files)
            readers = [stack.enter_context(ThreadPoolExecutor(1, "read-ahead")) for _ in opened]

            def ask(number: int) -> None:
                if number < len(plan):
                    ahead.append(readers[number % READERS].submit(read, number))

            ahead: deque[Future[Tile]] = deque()
            for number in range(AHEAD):
                ask(number)
            for number in range(len(plan)):
                tile = ahead.popleft().result()
                ask(number + AHEAD)  # into the buffer of the tile before, which is done with
                yield tile

    def total(self, partial: Tensor) -> Tensor:
        return partial

    def _largest_tile(self) -> int:
        N = len(self.clients)
        widths = [(min(prod(e.shape), tile_columns(N, e.dtype)), e.dtype) for e in self.entries]
        return max((_pitch(width, dtype) * (N + 1) for width, dtype in widths), default=0)


def _pitch(columns: int, dtype: torch.dtype) -> int:
    """Bytes from row to row: a line more than needed, or all rows would want the same places in a cache."""
    return (-(-columns * dtype.itemsize // LINE) + 1) * LINE


class _Files:
    """The file that a reader has open for each client: one at a time, since a checkpoint may have many shards."""

    def __init__(self) -> None:
        self._opened: dict[int, tuple[Path, int]] = {}
        self._tensor: str | None = None
        self._rows: list[tuple[int, int, Path]] = []

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: object) -> None:
        for _, file in self._opened.values():
            os.close(file)

    def turn_to(self, tensor: str, places: Mapping[int, _Place]) -> None:
        """Open the files of one tensor's rows."""
        if tensor == self._tensor:
            return
        self._tensor, self._rows = tensor, []
        for client, (path, offset) in places.items():
            opened, file = self._opened.get(client, (None, -1))
            if opened is not path:
                if opened is not None:
                    os.close(self._opened.pop(client)[1])
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._opened[client] = path, file
            self._rows.append((file, offset, path))

    def read(self, begin: int, size: int, to: memoryview, pitch: int) -> None:
        """Bytes [begin, begin + size) of every row, `pitch` apart. Kept short: the GIL is shared."""
        at = 0
        for file, offset, path in self._rows:
            count = os.preadv(file, [to[at : at + size]], offset + begin)
            while count < size:
                more = os.preadv(file, [to[at + count : at + size]], offset + begin + count)
                if more == 0:
                    raise ValueError(f"{path} ended while it was read; was it changed?")
                count += more
            at += pitch
