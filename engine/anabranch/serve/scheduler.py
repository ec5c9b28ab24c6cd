"""Continuous batching: which sequences advance in the next step, by how many tokens, and in which blocks.

First come, first served. The running sequences are always a prefix of the order of arrival: each step first gives every
running sequence its next tokens, oldest first, then admits waiting ones while the token budget lasts. A prompt longer
than what is left of the budget is computed in chunks. When the blocks run out, the newest running sequence gives all of
its own back and returns to the head of the queue, to be recomputed later (what is still cached by then is not).

A block is registered for sharing when the step that fills it is scheduled, not when it has run: inside a step every
layer stores all keys and values before it attends, so sequences admitted in the same step may already read the block.
That is how the samples of one prompt share its blocks from the first step on. If a step fails, `discard` takes the
registrations back.

A sequence that needs an adapter is admitted when its adapter has, or gets, a place on the device (slots.py). Until then
it waits at the head of the queue, and all others behind it.

A function of queues: no tensors, no clock, no randomness.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from anabranch.serve.adapters.slots import AdapterSlots, Load
from anabranch.serve.blocks import BlockPool, block_hash, root_hash

if TYPE_CHECKING:
    from anabranch.serve.adapters.library import LoadedAdapter


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One sample's tokens, and where their keys and values lie. Append to `tokens`; the scheduler keeps the rest."""

    tokens: list[int]  # prompt, then output
    max_len: int  # it ends at this many tokens at the latest, prompt included
    salt: str = ""  # only sequences with equal salts share blocks
    adapter: "LoadedAdapter | None" = None
    reuse: bool = True  # start from cached blocks; False computes every token again
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks, as far as they were needed
    registered: int = 0  # leading blocks that have been offered for sharing
    row: int = -1  # a number below max_num_seqs while running, -1 otherwise
    slot: int = -1  # of its adapter while running, -1 otherwise
    hit_tokens: int | None = None  # tokens found in the cache when it was first admitted


S = TypeVar("S", bound=Sequence)


@dataclass(slots=True)
class Step(Generic[S]):
    """One forward pass. Sequence i, on rows[i], computes its tokens starts[i] .. starts[i] + counts[i] - 1.

    Complete in itself: it stays as it is when one of its sequences is finished from outside while the step runs.
    """

    sequences: list[S] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of their adapters, -1 for none
    loads: list[Load] = field(default_factory=list)  # adapters to be put in their places before
    placed: list[tuple[int, int, list[int]]] = field(default_factory=list)  # row, index of the first, new blocks
    registered: list[int] = field(default_factory=list)  # blocks offered for sharing on the promise of this step


class Scheduler(Generic[S]):
    """Two queues over one pool of blocks.

    max_num_seqs            sequences that run at once
    max_num_batched_tokens  tokens of one step; at least max_num_seqs, so that every running sequence advances in it
    share_prefixes          find full blocks of earlier sequences again by their tokens
    adapters                the places for adapters; None: no sequence has one
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        share_prefixes: bool = True,
        adapters: AdapterSlots | None = None,
    ) -> None:
        if block_size < 1 or max_num_seqs < 1:
            raise ValueError(f"block_size and max_num_seqs must be at least 1, got {block_size} and {max_num_seqs}")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs={max_num_seqs}, got {max_num_batched_tokens}"
            )
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.share_prefixes = share_prefixes
        self.adapters = adapters
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self.preemptions = 0
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, seq: S) -> None:
        """Queue a sequence. ValueError if it could not finish even with the whole pool to itself."""
        self.check(len(seq.tokens), seq.max_len)
        self.waiting.append(seq)

    def check(self, tokens: int, max_len: int) -> None:
        """ValueError if a sequence of `tokens` that may grow to `max_len` can never run."""
        if not 1 <= tokens < max_len:
            raise ValueError(f"a sequence needs 1 <= tokens < max_len, got {tokens} tokens and max_len={max_len}")
        need = self._blocks_for(max_len - 1)  # the last token is never fed back
        if need > self.pool.num_blocks:
            raise ValueError(
                f"{max_len} tokens need {need} cache blocks of {self.block_size} tokens, and the cache has "
                f"{self.pool.num_blocks} in all: ask for fewer tokens or give it more memory"
            )

    def schedule(self) -> Step[S]:
        """The next step, its blocks taken; empty if nothing is queued. Run it, then call `complete` or `discard`."""
        step: Step[S] = Step()
        before = self.preemptions
        budget = self._advance(step)
        if self.preemptions == before:
            self._admit(step, budget)
        return step

    def complete(self, step: Step[S]) -> None:
        """The step has run: its tokens are in the cache. Sequences finished in the meantime are passed over."""
        for seq, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            if seq.row >= 0:
                seq.computed = start + count

    def discard(self, step: Step[S]) -> None:
        """The step has failed, and its sequences are finished: nobody may find what it was to fill and to load."""
        self.pool.forget(step.registered)
        for load in step.loads:
            assert self.adapters is not None
            self.adapters.forget(load.adapter)

    def finish(self, seq: S) -> None:
        """Take a sequence out of its queue, whatever its state, and give its blocks back at once."""
        if seq.row >= 0:
            self.running.remove(seq)
            self._vacate(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def _advance(self, step: Step[S]) -> int:
        budget = self.max_num_batched_tokens
        running = self.running
        index = 0
        while index < len(running):  # pre-emption shortens it at the end
            seq = running[index]
            count = min(len(seq.tokens) - seq.computed, budget)
            need = self._blocks_for(seq.computed + count) - len(seq.blocks)
            if need > 0 and not self._make_room(seq, need, step):
                break
            self._put(step, seq, count)
            budget -= count
            index += 1
        return budget

    def _make_room(self, seq: S, need: int, step: Step[S]) -> bool:
        """So many more blocks, if need be at the newest sequence's cost. False if that was `seq` itself."""
        while self.pool.num_free < need:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        self._extend(seq, self.pool.allocate(need), step)
        return True

    def _admit(self, step: Step[S], budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            spare = self.pool.num_free - len(self.running)  # one block each for those who run, before they pre-empt
            if spare <= 0:
                break
            hits = self._find(seq)
            idle = sum(self.pool.refs[block] == 0 for block in hits)
            need = self._blocks_for(len(seq.tokens)) - len(hits)
            if need + idle > spare or not self._claim_adapter(seq, step):
                break
            self.waiting.popleft()
            self.running.append(seq)
            seq.row = self._rows.pop()
            self.pool.hold(hits)
            self._extend(seq, hits + self.pool.allocate(need), step)
            seq.registered = len(hits)
            seq.computed = len(hits) * self.block_size
            if seq.hit_tokens is None:
                seq.hit_tokens = seq.computed
            count = min(len(seq.tokens) - seq.computed, budget)
            self._put(step, seq, count)
            budget -= count

    def _claim_adapter(self, seq: S, step: Step[S]) -> bool:
        """Pin what a sequence needs to run; False if it has to wait for it."""
        if seq.adapter is None:
            return True
        assert self.adapters is not None
        claim = self.adapters.claim(seq.adapter)
        if claim is None:
            return False
        seq.slot = claim.slot
        if claim.load is not None:
            step.loads.append(claim.load)
        return True

    def _find(self, seq: S) -> list[int]:
        """Known blocks at the start of a sequence, short of its last token, which must be computed for its logits."""
        if not (self.share_prefixes and seq.reuse):
            return []
        full = (len(seq.tokens) - 1) // self.block_size
        self._hash(seq, full)
        return self.pool.find(seq.hashes[:full])

    def _put(self, step: Step[S], seq: S, count: int) -> None:
        assert count > 0
        step.sequences.append(seq)
        step.rows.append(seq.row)
        step.starts.append(seq.computed)
        step.counts.append(count)
        step.slots.append(seq.slot)
        full = (seq.computed + count) // self.block_size
        if self.share_prefixes and full > seq.registered:
            self._hash(seq, full)
            for index in range(seq.registered, full):
                self.pool.register(seq.blocks[index], seq.hashes[index])
            step.registered += seq.blocks[seq.registered : full]
            seq.registered = full

    def _hash(self, seq: S, full: int) -> None:
        size = self.block_size
        for index in range(len(seq.hashes), full):
            adapter = None if seq.adapter is None else seq.adapter.number
            parent = seq.hashes[-1] if seq.hashes else root_hash(seq.salt, adapter)
            seq.hashes.append(block_hash(parent, seq.tokens[index * size : (index + 1) * size]))

    def _extend(self, seq: S, blocks: list[int], step: Step[S]) -> None:
        step.placed.append((seq.row, len(seq.blocks), blocks))
        seq.blocks += blocks

    def _preempt(self, seq: S) -> None:
        self.preemptions += 1
        popped = self.running.pop()
        assert popped is seq
        self._vacate(seq)
        self.waiting.appendleft(seq)

    def _vacate(self, seq: S) -> None:
        self.pool.release(seq.blocks)
        self._rows.append(seq.row)
        if seq.adapter is not None and self.adapters is not None:
            self.adapters.release(seq.adapter)
        seq.blocks, seq.row, seq.slot, seq.computed, seq.registered = [], -1, -1, 0, 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
