"""The pool of ranks against a list of who lies where."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.serve.adapters.slots import AdapterSlots

RANKS = 12


class Fake(NamedTuple):
    number: int
    ranks: int


adapters = st.lists(st.integers(1, RANKS), min_size=1, max_size=8).map(
    lambda sizes: [Fake(number, ranks) for number, ranks in enumerate(sizes)]
)
actions = st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60)


class World:
    """What lies at each rank, as the loads say."""

    def __init__(self, pool):
        self.pool, self.at, self.slot_of, self.pinned = pool, {}, {}, []

    def claim(self, adapter):
        before = dict(self.pool.residents)
        claim = self.pool.claim(adapter)
        if claim is None:
            assert dict(self.pool.residents) == before
            return None
        if claim.load is not None:
            assert adapter.number not in self.slot_of
            for slot in claim.load.freed:
                gone = next(number for number, held in self.slot_of.items() if held == slot)
                assert gone not in [pinned.number for pinned in self.pinned]  # pinned, it would have to stay
                del self.slot_of[gone]
                self.at = {rank: number for rank, number in self.at.items() if number != gone}
            assert claim.load.slot == claim.slot
            assert claim.slot not in self.slot_of.values()
            run = range(claim.load.first_rank, claim.load.first_rank + adapter.ranks)
            assert not set(run) & set(self.at)  # nobody else lies there
            assert set(run) <= set(range(self.pool.ranks))
            self.at |= dict.fromkeys(run, adapter.number)
            self.slot_of[adapter.number] = claim.slot
        assert self.slot_of[adapter.number] == claim.slot < self.pool.most_slots
        self.pinned.append(adapter)
        return claim


@given(adapters, actions, st.integers(1, 4))
def test_runs_never_overlap_and_the_pinned_stay(all_adapters, actions, most_slots):
    world = World(AdapterSlots(RANKS, most_slots))
    for is_claim, index in actions:
        if is_claim:
            adapter = all_adapters[index % len(all_adapters)]
            if world.claim(adapter) is None:
                others = {other.number for other in world.pinned}
                assert adapter.number not in others
                assert others  # alone it would have had a place
        elif world.pinned:
            world.pool.release(world.pinned.pop(index % len(world.pinned)))
    assert {number: resident.slot for number, resident in world.pool.residents.items()} == world.slot_of
    for adapter in world.pinned:
        world.pool.release(adapter)
    world.pinned.clear()
    for adapter in all_adapters:
        assert world.claim(adapter) is not None  # nothing is pinned but what came before it
        world.pool.release(world.pinned.pop())


def test_the_least_recently_used_goes_first():
    pool = AdapterSlots(3)
    a, b, c, d = (Fake(number, 1) for number in range(4))
    for adapter in (a, b, c):
        pool.claim(adapter)
    for adapter in (b, a, c):  # their sequences end
        pool.release(adapter)
    assert pool.claim(d).load.freed == (1,)
    assert list(pool.residents) == [0, 2, 3]
    assert (pool.loads, pool.evictions) == (4, 1)
    assert pool.claim(a).load is None


def test_nobody_goes_in_vain():
    pool = AdapterSlots(4)
    small, wide, held = Fake(0, 1), Fake(1, 3), Fake(2, 1)
    for adapter in (small, held):
        pool.claim(adapter)
    pool.release(small)
    assert pool.claim(wide) is None  # the pinned rank 1 stands in the middle
    assert list(pool.residents) == [2, 0]
    pool.release(held)
    assert pool.claim(wide).load.freed == (0, 1)


def test_what_did_not_arrive_is_loaded_again():
    pool = AdapterSlots(4)
    adapter = Fake(0, 2)
    pool.claim(adapter)
    pool.release(adapter)
    pool.forget(adapter)
    assert pool.claim(adapter).load is not None


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one rank and one slot, got 0 and 1"):
        AdapterSlots(0, 1)
