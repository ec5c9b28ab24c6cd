"""What is cut from a stream of tokens: seeded batches to train on, and windows to measure on.

A batch is a function of (seed, step) alone, so a run continues exactly where it stopped with nothing to restore.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Seeded batches over a stream: every epoch visits each window of `context` tokens once, in a new order.

    The windows of an epoch share a random phase, so that file positions do not stick to window positions.
    """

    stream: Tensor
    context: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(
                f"the text is shorter than the context: {self.stream.numel()} tokens to train on, "
                f"and a context of {self.context} needs at least {2 * self.context + 1}"
            )

    @property
    def windows(self) -> int:
        """Windows per epoch, the same for every phase."""
        return (self.stream.numel() - 1 - self.context) // self.context

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [batch, context] int64 of one step, counted from 0; targets are one token later."""
        places = [divmod(step * self.batch + row, self.windows) for row in range(self.batch)]
        starts = {epoch: self._starts(epoch) for epoch in {epoch for epoch, _ in places}}
        first = [int(starts[epoch][place]) for epoch, place in places]
        window = torch.stack([self.stream[start : start + self.context + 1] for start in first]).long()
        return window[:, :-1], window[:, 1:]

    def _starts(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        phase = torch.randint(self.context, (1,), generator=generator)
        return torch.randperm(self.windows, generator=generator) * self.context + phase


def held_out_windows(stream: Tensor, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets [n, context] int64 that predict each token of a stream once, except the first.

    The last, incomplete window is filled with targets of -100, which cross_entropy ignores. `limit` keeps that many
    windows, spread evenly over the stream.
    """
    n = -(-(stream.numel() - 1) // context)
    if n < 1:
        raise ValueError(f"nothing to measure on: the held-out text has {stream.numel()} tokens")
    padded = torch.full((n * context + 1,), -100, dtype=torch.int64)
    padded[: stream.numel()] = stream
    inputs, targets = padded[:-1].view(n, context), padded[1:].view(n, context)
    chosen = torch.arange(n) if limit is None or limit >= n else torch.arange(limit) * n // limit
    return inputs[chosen].clamp(min=0), targets[chosen]
