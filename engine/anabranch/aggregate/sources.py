"""Where clients' updates come from: named tensors, swept tile by tile, as often as a method asks.

A tile is a run of columns of one tensor, of some clients side by side. Nothing but a tile need be in memory. Tiles
begin at multiples of 1024 columns, where the ops begin anew too, so results do not depend on where they were cut.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TILE_BYTES = 16 << 20
COLUMNS = 1024
_SHOWN = 6  # names per kind in an error

# For each tensor which clients' rows to sweep, or None to pass it over.
Chosen = Sequence[Sequence[int] | None]


class Entry(NamedTuple):
    """A tensor that all clients hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Tile(NamedTuple):
    """Columns of one tensor. It holds until the next one is asked for.

    entry   index of the tensor
    begin   first column
    rows    [n, d]  of the chosen clients, in the order chosen; in the dtype stored; rows may lie apart
    base    [d]     the same columns of the base, if asked for and there is one
    """

    entry: int
    begin: int
    rows: Tensor
    base: Tensor | None


class Source(Protocol):
    """N clients' tensors. `base` is what updates are differences from, in all clients' shapes and dtypes."""

    @property
    def clients(self) -> Sequence[str]: ...

    @property
    def entries(self) -> Sequence[Entry]: ...

    @property
    def has_base(self) -> bool: ...

    def tiles(self, chosen: Chosen, *, base: bool) -> Iterator[Tile]:
        """One sweep, tensor after tensor. An empty choice gives tiles without rows."""
        ...

    def total(self, partial: Tensor) -> Tensor:
        """The sum over all processes that hold a part of every tensor."""
        ...


class NamedTensors:
    """Clients' tensors in memory.

    clients   mappings of the same names to tensors of the same shapes and dtypes
    base      such a mapping
    Raises ValueError that names what differs.
    """

    def __init__(self, clients: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None) -> None:
        if not clients:
            raise ValueError("there is nothing to aggregate: no clients were given")
        self.clients = [f"client {i}" for i in range(len(clients))]
        self.entries = [Entry(name, x.dtype, tuple(x.shape)) for name, x in clients[0].items()]
        self.has_base = base is not None
        self._tensors = [*clients, *([] if base is None else [base])]
        for name, tensors in zip([*self.clients, "the base"], self._tensors, strict=False):
            check_same(
                {e.name: e for e in self.entries},
                {key: Entry(key, x.dtype, tuple(x.shape)) for key, x in tensors.items()},
                self.clients[0],
                name,
            )

    def tiles(self, chosen: Chosen, *, base: bool) -> Iterator[Tile]:
        for index, begin, end in pieces(self.entries, len(self.clients), chosen):
            name, dtype, _ = self.entries[index]
            wanted = [*(chosen[index] or ()), *([len(self.clients)] if base and self.has_base else [])]
            parts = [self._tensors[i][name].reshape(-1)[begin:end] for i in wanted]
            rows = torch.stack(parts) if parts else torch.empty(0, end - begin, dtype=dtype)
            n = len(chosen[index] or ())
            yield Tile(index, begin, rows[:n], rows[n] if len(rows) > n else None)

    def total(self, partial: Tensor) -> Tensor:
        return partial


class Sharded:
    """Parts of every tensor in each of several processes: of the same names, of any sizes.

    Made by all processes of the group together, as `total` is called by all. Raises ValueError in all of them where
    names or the number of clients differ.
    """

    def __init__(self, source: Source, group: dist.ProcessGroup) -> None:
        self._source, self._group = source, group
        self.clients, self.entries, self.has_base = source.clients, source.entries, source.has_base
        words = [str(len(self.clients)), str(self.has_base), *(f"{e.name} {e.dtype}" for e in self.entries)]
        digest = hashlib.sha256("\n".join(words).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64)
        both = torch.cat([mine, -mine])
        dist.all_reduce(both, dist.ReduceOp.MAX, group)
        if not torch.equal(both[:32], -both[32:]):
            raise ValueError("processes hold tensors of other names or dtypes, or other numbers of clients")

    def tiles(self, chosen: Chosen, *, base: bool) -> Iterator[Tile]:
        return self._source.tiles(chosen, base=base)

    def total(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self._group)
        return partial


def pieces(entries: Sequence[Entry], N: int, chosen: Chosen) -> Iterator[tuple[int, int, int]]:
    """Entry, first column and end of each tile of a sweep. They depend on N, not on how many rows are chosen."""
    for index, (entry, rows) in enumerate(zip(entries, chosen, strict=True)):
        if rows is not None:
            width = tile_columns(N, entry.dtype)
            D = prod(entry.shape)
            for begin, end in pairwise([*range(0, D, width), D]):
                yield index, begin, end


def tile_columns(N: int, dtype: torch.dtype) -> int:
    """Columns of a tile of N rows, and one of the base."""
    return max(1, TILE_BYTES // ((N + 1) * dtype.itemsize * COLUMNS)) * COLUMNS


def check_same(wanted: Mapping[str, Entry], found: Mapping[str, Entry], reference: str, name: str) -> None:
    """ValueError where tensors differ in name, shape or dtype; it says which."""
    differ = [(wanted[key], found[key]) for key in wanted if key in found and wanted[key] != found[key]]
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "that differ": [
            f"{want.name} is {list(got.shape)} {got.dtype} instead of {list(want.shape)} {want.dtype}"
            for want, got in differ
        ],
    }
    if any(problems.values()):
        lines = [
            f"{len(names)} tensors {kind}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(f"{name} does not hold the tensors of {reference}: {'; '.join(lines)}")
