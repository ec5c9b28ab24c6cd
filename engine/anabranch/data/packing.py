"""Examples put side by side in rows of one length, so that little of a batch is padding.

Rows are a function of (seed, epoch) alone, so a run goes on exactly where it stopped. Examples in a row do not see each
other: positions start anew and attention stays within (`segments`).
"""

from bisect import bisect_right
from collections.abc import Sequence
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
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    segments: list[list[int]]


class Packs:
    """Seeded batches of packed examples. Those longer than the context are cut at its end (`cut` counts them)."""

    def __init__(self, examples: Sequence[Example], *, context: int, batch: int, seed: int) -> None:
        if not examples or context < 2 or batch < 1:
            raise ValueError(f"need examples, context >= 2, batch >= 1, got {len(examples)}, {context}, {batch}")
        self.context, self.batch, self.seed = context, batch, seed
        # The last token of an example is a target only.
        self._examples = [Example(one.ids[: context + 1], one.learnt[: context + 1]) for one in examples]
        self._examples = [one for one in self._examples if any(one.learnt[1:])]
        if not self._examples:
            raise ValueError(f"within a context of {context} tokens no example has anything to learn")
        self.cut = sum(len(one.ids) > context + 1 for one in examples)
        self._rows = lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # first row of each epoch that was looked at, in all epochs together

    def at(self, step: int) -> Packed:
        """The batch of a step, counted from 0. Epochs follow each other without a break."""
        return self._batch([self._row(step * self.batch + row) for row in range(self.batch)])

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
        room: list[int] = []
        rows: list[list[int]] = []
        for index in torch.randperm(len(self._examples), generator=generator).tolist():
            need = len(self._examples[index].ids) - 1
            best = min((row for row in range(len(rows)) if room[row] >= need), key=room.__getitem__, default=None)
            if best is None:
                rows.append([])
                room.append(self.context)
                best = len(rows) - 1
            rows[best].append(index)
            room[best] -= need
        return rows

    def _batch(self, rows: list[list[int]]) -> Packed:
        inputs, positions = (torch.zeros(len(rows), self.context, dtype=torch.int64) for _ in range(2))
        targets, segments = torch.full_like(inputs, IGNORED), []
        for row, examples in enumerate(rows):
            at, lengths = 0, []
            for index in examples:
                one = self._examples[index]
                length = len(one.ids) - 1
                part = slice(at, at + length)
                inputs[row, part] = torch.tensor(one.ids[:-1])
                wanted, learnt = torch.tensor(one.ids[1:]), torch.tensor(one.learnt[1:])
                targets[row, part] = torch.where(learnt, wanted, IGNORED)
                positions[row, part] = torch.arange(length)
                at += length
                lengths.append(length)
            segments.append([*lengths, self.context - at] if at < self.context else lengths)
        return Packed(inputs, targets, positions, segments)
