"""The scheduler against a model of the cache: a dictionary from slot to what was written there."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from anabranch.serve.adapters.slots import AdapterSlots
from anabranch.serve.blocks import BlockPool
from anabranch.serve.scheduler import Scheduler, Sequence, Step


@dataclass(slots=True, eq=False, kw_only=True)
class Numbered(Sequence):
    number: int = 0
    prompt_len: int = 0
    steps: list[int] = field(default_factory=list)  # tokens computed in each of its steps
    histories: list[int] = field(default_factory=list)


class Adapter(NamedTuple):
    number: int
    ranks: int


class World:
    """Runs a scheduler's steps on a cache that records, for each slot, the whole history its content depends on."""

    def __init__(self, *, blocks, block_size, max_num_seqs, max_num_batched_tokens, share_prefixes=True, ranks=0):
        self.pool = BlockPool(blocks)
        self.scheduler: Scheduler[Numbered] = Scheduler(
            self.pool, block_size=block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            share_prefixes=share_prefixes, adapters=AdapterSlots(ranks) if ranks else None,
        )  # fmt: skip
        self.device: dict[int, tuple[int, int]] = {}  # what lies at each rank of the pool: an adapter, in a slot
        self.tables: dict[int, dict[int, int]] = {}
        self.cache: dict[int, int] = {}
        self.names: dict[tuple[int | str, int], int] = {}
        self.live: list[Numbered] = []
        self.finished: list[Numbered] = []
        self.admitted: list[int] = []
        self.count = 0

    def add(self, prompt, max_new, salt="", reuse=True, adapter=None):
        seq = Numbered(
            tokens=list(prompt), max_len=len(prompt) + max_new, salt=salt, reuse=reuse, number=self.count,
            prompt_len=len(prompt), adapter=adapter,
        )  # fmt: skip
        self.count += 1
        self.scheduler.add(seq)
        self.live.append(seq)
        return seq

    def histories(self, seq):
        """For each token, a name of all that its keys and values depend on: salt, adapter, tokens before it, itself."""
        for token in seq.tokens[len(seq.histories) :]:
            past = (seq.histories[-1] if seq.histories else (seq.salt, seq.adapter), token)
            seq.histories.append(self.names.setdefault(past, len(self.names)))
        return seq.histories

    def run(self, step: Step[Numbered], fails=False):
        size = self.scheduler.block_size
        for row, first, blocks in step.placed:
            table = self.tables[row] = {} if first == 0 else self.tables[row]
            table.update({first + i: block for i, block in enumerate(blocks)})
        for load in () if fails else step.loads:
            self.device = {rank: held for rank, held in self.device.items() if held[1] not in load.freed}
            run = range(load.first_rank, load.first_rank + load.adapter.ranks)
            self.device.update(dict.fromkeys(run, (load.adapter.number, load.slot)))
        for seq, slot in zip(step.sequences, step.slots, strict=True):
            assert (slot < 0) == (seq.adapter is None)
            if not fails and seq.adapter is not None:
                assert list(self.device.values()).count((seq.adapter.number, slot)) == seq.adapter.ranks
        work = list(zip(step.sequences, step.rows, step.starts, step.counts, strict=True))
        for seq, row, start, count in work:  # every store precedes every read, as in a layer
            histories = self.histories(seq)
            for position in range(start, start + count):
                block = self.tables[row][position // size]
                self.cache[block * size + position % size] = -1 if fails else histories[position]
        for seq, row, start, count in work:
            if not fails:
                slots = [
                    self.tables[row][i] * size + j for i in range(-(-(start + count) // size)) for j in range(size)
                ]
                assert [self.cache[slot] for slot in slots[: start + count]] == seq.histories[: start + count]
            seq.steps.append(count)

    def step(self, sample, fails=False, during=lambda: None):
        scheduler = self.scheduler
        running_before = list(scheduler.running)
        step = scheduler.schedule()
        self.check_step(step, running_before)
        during()
        self.run(step, fails)
        if fails:
            for seq in step.sequences:
                self.end(seq)
            scheduler.discard(step)
            self.check_adapters()
            return step
        scheduler.complete(step)
        for seq, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            if seq.row >= 0 and start + count == len(seq.tokens):
                seq.tokens.append(sample(seq))
                if len(seq.tokens) == seq.max_len or seq.tokens[-1] == 0:
                    self.end(seq)
        self.check_blocks()
        self.check_adapters()
        return step

    def end(self, seq):
        self.scheduler.finish(seq)
        if seq in self.live:
            self.live.remove(seq)
            self.finished.append(seq)

    def check_step(self, step, running_before):
        scheduler = self.scheduler
        assert step.sequences == scheduler.running  # every running sequence advances in every step
        assert sum(step.counts) <= scheduler.max_num_batched_tokens
        for seq, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            assert count >= 1
            assert start == seq.computed
            assert start + count <= len(seq.tokens)
            if start + count < len(seq.tokens):  # a chunk: it took all that was left, and nobody came after it
                assert sum(step.counts) == scheduler.max_num_batched_tokens
                assert seq is step.sequences[-1]
        assert len(set(step.rows)) == len(step.rows) == len(scheduler.running) <= scheduler.max_num_seqs
        numbers = [seq.number for seq in scheduler.running] + [seq.number for seq in scheduler.waiting]
        assert numbers == sorted(numbers)  # first come, first served
        assert set(scheduler.running) | set(scheduler.waiting) == set(self.live)
        if scheduler.waiting or scheduler.running:
            assert step.sequences  # never idle while there is work
        if len(scheduler.running) < len(running_before):
            assert scheduler.running == running_before[: len(scheduler.running)]  # the newest were pre-empted

    def check_adapters(self):
        if self.scheduler.adapters is not None:
            users = [seq.adapter.number for seq in self.scheduler.running if seq.adapter is not None]
            pins = {number: held.pins for number, held in self.scheduler.adapters.residents.items() if held.pins}
            assert pins == {number: users.count(number) for number in users}

    def check_blocks(self):
        pool, scheduler = self.pool, self.scheduler
        held: dict[int, int] = {}
        for seq in scheduler.running:
            assert len(seq.blocks) == len(set(seq.blocks))
            assert len(seq.blocks) * scheduler.block_size >= seq.computed
            for block in seq.blocks:
                held[block] = held.get(block, 0) + 1
        for seq in scheduler.waiting:
            assert (seq.blocks, seq.computed, seq.row) == ([], 0, -1)
        assert [held.get(block, 0) for block in range(pool.num_blocks)] == pool.refs
        idle = [*pool.blank, *pool.cached]
        assert sorted([*held, *idle]) == list(range(pool.num_blocks))  # each block in exactly one state
        assert {digest: block for block, digest in enumerate(pool.hashes) if digest is not None} == pool.by_hash
        assert all(pool.hashes[block] is not None for block in pool.cached)
        assert all(pool.hashes[block] is None for block in pool.blank)
        size = scheduler.block_size
        for block, readers in held.items():
            if readers > 1:  # shared blocks are full and registered, so nobody writes to them
                assert pool.hashes[block] is not None
                for seq in scheduler.running:
                    if block in seq.blocks:
                        assert (seq.blocks.index(block) + 1) * size <= seq.computed


WORLDS = {
    "tiny-pool": {"blocks": 7, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 8},
    "one-token-blocks": {"blocks": 24, "block_size": 1, "max_num_seqs": 5, "max_num_batched_tokens": 5},
    "one-sequence": {"blocks": 8, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 3},
    "small-chunks": {"blocks": 40, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 7},
    "roomy": {"blocks": 90, "block_size": 4, "max_num_seqs": 12, "max_num_batched_tokens": 64},
    "no-sharing": {
        "blocks": 16,
        "block_size": 3,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 11,
        "share_prefixes": False,
    },
    "wide-blocks": {"blocks": 6, "block_size": 16, "max_num_seqs": 5, "max_num_batched_tokens": 24},
    "tight": {"blocks": 12, "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 16},
    "adapters": {"blocks": 40, "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 16, "ranks": 9},
    "one-adapter": {"blocks": 12, "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 16, "ranks": 4},
}
ADAPTERS = [Adapter(number, ranks) for number, ranks in enumerate([1, 2, 4, 3, 1, 4])]
STEPS = 13_000  # in each of the ten worlds: more than 10^5 in all


@pytest.mark.parametrize("name", WORLDS)
def test_random_traffic(name):
    world = World(**WORLDS[name])
    rng = random.Random(name)
    scheduler = world.scheduler
    longest = scheduler.block_size * scheduler.pool.num_blocks + 1
    stems = [[rng.randrange(1, 5) for _ in range(24)] for _ in range(4)]
    aborted = failed = 0

    def arrive():
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem))] + [rng.randrange(1, 5) for _ in range(rng.randrange(3))]
        prompt = prompt[: longest - 1]
        max_new = rng.randrange(1, min(24, longest - len(prompt)) + 1)
        salt = rng.choice(["", "", "", "tenant"])
        adapter = rng.choice([None, *ADAPTERS]) if scheduler.adapters is not None else None
        for _ in range(rng.choice([1, 1, 1, 3])):  # several samples of one prompt come together
            world.add(prompt, max_new, salt, reuse=rng.random() < 0.9, adapter=adapter)

    def abort():
        nonlocal aborted
        if world.live and rng.random() < 0.03:
            aborted += 1
            world.end(rng.choice(world.live))

    for _ in range(STEPS):
        while len(world.live) < 20 and rng.random() < 0.4:
            arrive()
        abort()
        fails = rng.random() < 0.002
        failed += fails
        world.step(lambda seq: rng.randrange(0 if rng.random() < 0.2 else 1, 5), fails, during=abort)
    while world.live:
        world.step(lambda seq: 1)
    assert world.pool.num_free == world.pool.num_blocks  # no block leaked
    assert sorted(seq.number for seq in world.finished) == list(range(world.count))  # every one ended
    assert aborted > 100
    assert failed > 5
    if scheduler.adapters is not None:
        assert scheduler.adapters.evictions > 500
    if name in ("tiny-pool", "tight", "wide-blocks", "no-sharing"):
        assert scheduler.preemptions > 20
    if scheduler.share_prefixes:
        assert sum(seq.hit_tokens or 0 for seq in world.finished) > 1000


def test_who_waits_for_an_adapter_holds_up_those_behind():
    world = World(blocks=40, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, ranks=4)
    first = world.add([1, 2], 3, adapter=ADAPTERS[2])
    waits, behind = world.add([3, 4], 3, adapter=ADAPTERS[1]), world.add([5, 6], 3)
    while first in world.live:
        assert world.step(lambda seq: 1).sequences == [first]
    step = world.step(lambda seq: 1)
    assert step.sequences == [waits, behind]
    assert [(load.adapter, load.freed) for load in step.loads] == [(ADAPTERS[1], (0,))]
    assert step.slots == [0, -1]


def test_tokens_are_computed_exactly_once_without_preemption():
    world = World(blocks=100, block_size=4, max_num_seqs=4, max_num_batched_tokens=6)
    seqs = [world.add([number + 1] * (3 + 5 * number), 7) for number in range(4)]
    while world.live:
        world.step(lambda seq: 1)
    assert world.scheduler.preemptions == 0
    for seq in seqs:
        assert sum(seq.steps) + seq.hit_tokens == seq.max_len - 1  # the last token is never fed back


def test_samples_of_one_prompt_share_its_full_blocks_in_the_first_step():
    world = World(blocks=20, block_size=4, max_num_seqs=4, max_num_batched_tokens=64)
    first, second, third = (world.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 4) for _ in range(3))
    step = world.scheduler.schedule()
    assert step.counts == [9, 1, 1]
    assert first.blocks[:2] == second.blocks[:2] == third.blocks[:2]
    assert len({first.blocks[2], second.blocks[2], third.blocks[2]}) == 3


def test_a_preempted_sequence_finds_its_own_blocks_again():
    world = World(blocks=5, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    old, new = world.add([1, 2, 3], 7), world.add([4, 3, 2], 7)
    while old in world.live:
        world.step(lambda seq: 3)
    assert world.scheduler.preemptions > 0
    assert len(new.steps) < len(new.tokens)
    while world.live:
        world.step(lambda seq: 3)
    assert sum(new.steps) < 2 * new.max_len  # it did not start from nothing each time


def test_nobody_overtakes_a_long_prompt():
    world = World(blocks=10, block_size=4, max_num_seqs=4, max_num_batched_tokens=8)
    world.add([1] * 20, 8)
    long, short = world.add([2] * 36, 4), world.add([3], 2)
    while long in world.live and not long.steps:
        assert not short.steps
        world.step(lambda seq: 1)
    assert long.steps


def test_what_can_never_fit_is_refused_at_once():
    world = World(blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match=r"18 tokens need 5 cache blocks of 4 tokens, and the cache has 4"):
        world.scheduler.add(Numbered(tokens=[1] * 8, max_len=18))
    world.add([1] * 8, 9)  # 17 tokens, of which the last is never cached: exactly full
    while world.live:
        world.step(lambda seq: 1)
    assert len(world.finished[0].tokens) == 17


@pytest.mark.parametrize(("tokens", "max_len"), [(0, 4), (4, 4), (5, 4)])
def test_a_sequence_needs_a_token_and_room_for_another(tokens, max_len):
    world = World(blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match="1 <= tokens < max_len"):
        world.scheduler.add(Numbered(tokens=[1] * tokens, max_len=max_len))


def test_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match="at least max_num_seqs=4, got 3"):
        World(blocks=4, block_size=4, max_num_seqs=4, max_num_batched_tokens=3)
