"""Which adapters lie where in the device's pool of ranks, and which of them gives way to another.

An adapter takes one run of ranks, the same in every layer, as long as its layer of most ranks needs. A slot is its
number in the tables that the op reads. Adapters of running sequences are pinned; of the others the least recently used
goes first, until there is a hole for the newcomer.

Pure Python, no tensors: `arena.py` does what is decided here.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from anabranch.serve.adapters.library import LoadedAdapter

MOST_SLOTS = 1024  # adapters on the device at once


class Load(NamedTuple):
    """To be done before the next step: put an adapter at its place. The slots in `freed` hold nothing any more."""

    adapter: "LoadedAdapter"
    slot: int
    first_rank: int
    freed: tuple[int, ...]


class Claim(NamedTuple):
    """An adapter pinned for a sequence; `load` if it was not on the device yet."""

    slot: int
    load: Load | None


@dataclass(slots=True)
class Resident:
    """An adapter on the device, or on its way there."""

    slot: int
    first_rank: int
    ranks: int
    pins: int = 0


class AdapterSlots:
    """The pool's ranks and slots. `residents` are by the adapters' numbers, least recently used first."""

    def __init__(self, ranks: int, most_slots: int = MOST_SLOTS) -> None:
        if ranks < 1 or most_slots < 1:
            raise ValueError(f"a pool needs at least one rank and one slot, got {ranks} and {most_slots}")
        self.ranks = ranks
        self.most_slots = most_slots
        self.residents: OrderedDict[int, Resident] = OrderedDict()
        self.loads = 0
        self.evictions = 0

    def claim(self, adapter: "LoadedAdapter") -> Claim | None:
        """Pin an adapter for one sequence; None, and nothing changes, if it must wait until others are released."""
        assert adapter.ranks <= self.ranks  # the library loads no other
        load = None
        if adapter.number not in self.residents:
            load = self._make_room(adapter)
            if load is None:
                return None
            self.residents[adapter.number] = Resident(load.slot, load.first_rank, adapter.ranks)
            self.loads += 1
        resident = self.residents[adapter.number]
        resident.pins += 1
        self.residents.move_to_end(adapter.number)
        return Claim(resident.slot, load)

    def release(self, adapter: "LoadedAdapter") -> None:
        """One sequence has ended, or was pre-empted."""
        resident = self.residents[adapter.number]
        assert resident.pins > 0
        resident.pins -= 1
        self.residents.move_to_end(adapter.number)

    def forget(self, adapter: "LoadedAdapter") -> None:
        """It may not have reached the device: whoever needs it next loads it again."""
        assert self.residents[adapter.number].pins == 0
        del self.residents[adapter.number]

    def _make_room(self, adapter: "LoadedAdapter") -> Load | None:
        pinned = [resident for resident in self.residents.values() if resident.pins]
        if len(pinned) == self.most_slots or self._hole(adapter.ranks, pinned) is None:
            return None  # before anybody has to go in vain
        freed = []
        while True:
            first = self._hole(adapter.ranks, self.residents.values())
            if first is not None and len(self.residents) < self.most_slots:
                break
            oldest = next(number for number, resident in self.residents.items() if not resident.pins)
            freed.append(self.residents.pop(oldest).slot)
            self.evictions += 1
        taken = {resident.slot for resident in self.residents.values()}
        slot = next(slot for slot in range(self.most_slots) if slot not in taken)
        return Load(adapter, slot, first, tuple(freed))

    def _hole(self, ranks: int, residents: Iterable[Resident]) -> int | None:
        """Where so many ranks begin that none of these residents has; the lowest place there is."""
        end = 0
        for resident in sorted(residents, key=lambda resident: resident.first_rank):
            if resident.first_rank - end >= ranks:
                break
            end = resident.first_rank + resident.ranks
        return end if end + ranks <= self.ranks else None
