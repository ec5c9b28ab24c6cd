"""Examples put side by side in rows of one length, so that little of a batch is padding.

Rows are a function of (seed, epoch) alone, so a run goes on exactly where it stopped. Examples in a row do not see each
other: positions start anew and attention stays within (`segments`).
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from anabranch.data.instructions import Example

IGNORED = -100  # a target that cross_entropy leaves out


@dataclass(frozen=True, slots=True)
class Packed:
    """One batch, [rows, context] int64 each.

    inputs     tokens; 0 behind the last example
    targets    the next token of the same example where it is to be learnt, else IGNORED
    positions  within the example
    segments   lengths of the pieces of each row, padding as the last
    used       bool, where there is no padding
    examples   how many there are in all rows together
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    segments: list[list[int]]
    used: Tensor
    examples: int


class Packs:
    """Seeded batches of packed examples, which are held as 5 bytes a token.

    examples   how many there are
    cut        of these, how many were longer than the context and end there
    dropped    how many had nothing to learn within the context and are left out
    digest     sha256 of what is learnt from
    """

    def __init__(self, examples: Iterable[Example], *, context: int, batch: int, seed: int) -> None:
        if context < 2 or batch < 1:
            raise ValueError(f"need context >= 2 and batch >= 1, got {context} and {batch}")
        self.context, self.batch, self.seed = context, batch, seed
        self.cut = self.dropped = 0
        ids, learnt, ends = array("i"), bytearray(), array("q", [0])
        for one in examples:
            kept = slice(0, context + 1)  # the last token of an example is a target only
            if not any(one.learnt[kept][1:]):
                self.dropped += 1
                continue
            self.cut += len(one.ids) > context + 1
            ids.extend(one.ids[kept])
            learnt.extend(one.learnt[kept])
            ends.append(len(ids))
        if not ids:
            raise ValueError(f"no example has anything to learn within a context of {context} tokens")
        self.examples, self._ends = len(ends) - 1, ends
        self._ids, self._learnt = torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(learnt, dtype=torch.bool)
        digest = hashlib.sha256()
        for part in (ends, ids, learnt):
            digest.update(part)
        self.digest = digest.hexdigest()
        self._rows = lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # first row of each epoch that was looked at, in all epochs together

    def at(self, step: int) -> Packed:
        """The batch of a step, counted from 0. Epochs follow each other without a break."""
        return self._batch([self._row(step * self.batch + row) for row in range(self.batch)])

    def once(self) -> Iterator[Packed]:
        """Batches that hold every example once; the last may have fewer rows."""
        rows = self._rows(0)
        return (self._batch(rows[first : first + self.batch]) for first in range(0, len(rows), self.batch))

    def _row(self, number: int) -> list[int]:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self.rows(len(self._starts) - 1))
        epoch = bisect_right(self._starts, number) - 1
        return self._rows(epoch)[number - self._starts[epoch]]

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return len(self._rows(epoch))

    def _pack(self, epoch: int) -> list[list[int]]:
        """Examples of each row: in a new order, each into the fullest open row that has room."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows: list[list[int]] = []
        open_rows: list[tuple[int, int]] = []  # room and number, the fullest first
        for index in torch.randperm(self.examples, generator=generator).tolist():
            need = self._ends[index + 1] - self._ends[index] - 1
            place = bisect_left(open_rows, (need, 0))
            if place < len(open_rows):
                room, row = open_rows.pop(place)
            else:
                room, row = self.context, len(rows)
                rows.append([])
            rows[row].append(index)
            if room > need:
                insort(open_rows, (room - need, row))
        return rows

    def _batch(self, rows: list[list[int]]) -> Packed:
        inputs, positions = (torch.zeros(len(rows), self.context, dtype=torch.int64) for _ in range(2))
        targets, segments = torch.full_like(inputs, IGNORED), []
        used = torch.zeros_like(inputs, dtype=torch.bool)
        for row, examples in enumerate(rows):
            at, lengths = 0, []
            for index in examples:
                first, last = self._ends[index], self._ends[index + 1] - 1
                length = last - first
                part = slice(at, at + length)
                inputs[row, part] = self._ids[first:last]
                learnt = self._learnt[first + 1 : last + 1]
                targets[row, part] = torch.where(learnt, self._ids[first + 1 : last + 1], IGNORED).long()
                positions[row, part] = torch.arange(length)
                at += length
                lengths.append(length)
            used[row, :at] = True
            segments.append([*lengths, self.context - at] if at < self.context else lengths)
        return Packed(inputs, targets, positions, segments, used, sum(map(len, rows)))
