"""Adapters by name: folders on disk, of which the last used are kept in memory.

A request takes an adapter with its weights when it arrives and holds them to its end, so that neither unloading nor a
full memory nor a folder that is deleted can harm it. Everything here may read files, so callers have their own threads
for it: the engine's never comes here.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from anabranch.adapters.attach import Place
from anabranch.adapters.files import CONFIG, WEIGHTS, read_adapters
from anabranch.adapters.packed import Packed

FILES = (CONFIG, WEIGHTS)
MOST_NAMES = 10_000
SHOWN_NAMES = 20  # in an error
Stamp = tuple[tuple[int, int, int], ...]


class UnknownAdapter(ValueError):
    """No adapter has this name."""


class AdapterUnreadable(RuntimeError):
    """An adapter has left memory, and its folder is not what it was."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class LoadedAdapter:
    """An adapter with its weights in memory, in the model's dtype: what requests hold.

    number   of the load that it came by: no other has it, whatever its name and folder
    ranks    most of its layers
    weights  by the names of linear layers
    """

    number: int
    ranks: int
    nbytes: int
    weights: Mapping[str, Packed]


@dataclass(frozen=True, slots=True, eq=False)
class NamedAdapter:
    """A folder under a name. `stamp` says which files these were when they were loaded."""

    number: int
    name: str
    folder: Path
    stamp: Stamp
    reading: Lock = field(default_factory=Lock, repr=False)


class AdapterLibrary:
    """Names, and adapters in memory.

    places      the model's linear layers
    host_bytes  of adapters kept in memory; those that requests hold stay beyond that, to their end
    """

    def __init__(self, places: Mapping[str, Place], *, host_bytes: int) -> None:
        if host_bytes < 0:
            raise ValueError(f"adapter_host_bytes must not be negative, got {host_bytes}")
        self.places = places
        self.host_bytes = host_bytes
        self.reads = 0
        self._most_ranks: int | None = None
        self._most_bytes: int | None = None
        self._names: dict[str, NamedAdapter] = {}
        self._kept: OrderedDict[int, LoadedAdapter] = OrderedDict()  # least recently used first
        self._kept_bytes = 0
        self._alive: WeakValueDictionary[int, LoadedAdapter] = WeakValueDictionary()
        self._numbers = 0
        self._lock = Lock()  # of all of these; never held while a file is read
        self._loading = Lock()  # one folder is read for the first time at once

    def limit(self, *, ranks: int, file_bytes: int) -> None:
        """From now on load no adapter with more ranks in a layer, and read no file that has more bytes."""
        self._most_ranks, self._most_bytes = ranks, file_bytes

    def names(self) -> list[NamedAdapter]:
        """All there are, in the order of their loading."""
        with self._lock:
            return list(self._names.values())

    def find(self, name: str) -> NamedAdapter:
        """What a name stands for now. UnknownAdapter if it stands for nothing."""
        with self._lock:
            return self._named(name)

    def load(self, name: str, folder: str | Path, *, replace: bool = False) -> NamedAdapter:
        """Read a folder and give it a name, which new requests may use from now on.

        replace   a name that is taken passes to the new folder; running requests keep what they have

        Raises ValueError for a name that is taken and a folder that cannot be served; OSError if it cannot be read.
        """
        with self._loading:
            self._check_name(name, replace)
            self._numbers += 1
            named = NamedAdapter(self._numbers, name, Path(folder), _stamp(Path(folder)))
            loaded = self._read(named)
            with self._lock:
                self._retire(name)
                self._names[name] = named
                self._keep(loaded)
            return named

    def unload(self, name: str) -> None:
        """Forget a name; running requests go on. UnknownAdapter if it is not there."""
        with self._lock:
            self._retire(self._named(name).name)

    def open(self, named: NamedAdapter) -> LoadedAdapter:
        """Its weights, from memory or else from its folder.

        Raises AdapterUnreadable if it is in memory no longer and its files are not those that were loaded.
        """
        loaded = self._recall(named)
        if loaded is not None:
            return loaded
        with named.reading:  # who comes meanwhile waits for the one who reads
            loaded = self._recall(named)
            if loaded is None:
                loaded = self._read_again(named)
                with self._lock:
                    self._keep(loaded)
            return loaded

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def _named(self, name: str) -> NamedAdapter:
        found = self._names.get(name)
        if found is None:
            raise UnknownAdapter(f"there is no adapter {name!r}; loaded are {list(self._names)[:SHOWN_NAMES]}")
        return found

    def _check_name(self, name: str, replace: bool) -> None:
        if not name:
            raise ValueError("an adapter needs a name")
        with self._lock:
            if name in self._names and not replace:
                raise ValueError(f"the adapter {name!r} is loaded already; unload it first, or replace it")
            if name not in self._names and len(self._names) >= MOST_NAMES:
                raise ValueError(f"{MOST_NAMES} adapters are loaded already, and more are not allowed")

    def _read(self, named: NamedAdapter) -> LoadedAdapter:
        self.reads += 1
        layers = read_adapters(self.places, named.folder, device="cpu", most_bytes=self._most_bytes)
        weights = {name: layer.packed() for name, layer in layers.items()}
        ranks = max(packed.place.ranks for packed in weights.values())
        if self._most_ranks is not None and ranks > self._most_ranks:
            raise ValueError(
                f"adapter {named.name!r} has {ranks} ranks, there is room for {self._most_ranks}: raise adapter_bytes"
            )
        nbytes = sum(tensor.nbytes for packed in weights.values() for tensor in packed[1:])
        return LoadedAdapter(named.number, ranks, nbytes, weights)

    def _read_again(self, named: NamedAdapter) -> LoadedAdapter:
        try:
            if _stamp(named.folder) == named.stamp:
                return self._read(named)
        except (ValueError, OSError) as error:
            raise AdapterUnreadable(f"the adapter {named.name!r} cannot be read again") from error
        raise AdapterUnreadable(f"the files of adapter {named.name!r} have changed since; load it again")

    def _recall(self, named: NamedAdapter) -> LoadedAdapter | None:
        """What is in memory still."""
        with self._lock:
            loaded = self._alive.get(named.number)
            if loaded is not None:
                self._keep(loaded)
            return loaded

    def _keep(self, loaded: LoadedAdapter) -> None:
        self._alive[loaded.number] = loaded
        if loaded.number not in self._kept:
            self._kept[loaded.number] = loaded
            self._kept_bytes += loaded.nbytes
        self._kept.move_to_end(loaded.number)
        while self._kept_bytes > self.host_bytes:
            self._drop(next(iter(self._kept)))

    def _retire(self, name: str) -> None:
        """Who found the name before may still ask for it: it leaves memory as the next, but not at once."""
        named = self._names.pop(name, None)
        if named is not None and named.number in self._kept:
            self._kept.move_to_end(named.number, last=False)

    def _drop(self, number: int) -> None:
        dropped = self._kept.pop(number, None)
        if dropped is not None:
            self._kept_bytes -= dropped.nbytes


def _stamp(folder: Path) -> Stamp:
    """Which files these are: names of one folder may be given to others."""
    found = []
    for name in FILES:
        try:
            status = os.stat(folder / name)
        except FileNotFoundError:
            continue  # reading says what is missing
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
