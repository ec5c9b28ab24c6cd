"""A boolean attention mask taken apart into pieces that are plain causal, where it consists of such pieces.

Padding, packed sequences, sliding windows and chunks all come as one dense mask [B, 1, T, S]. Yet each of their rows
sees an unbroken range of keys, and from row to row the range moves along: a kernel that knows causality and windows
needs no mask for them. Masks of other kinds (holes, prefixes seen both ways, one per head) are told apart by comparing
element by element, so that a piece never stands for something that it is not.
"""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

ROWS = 16  # queries that a piece should have: for shorter ones the calls cost more than the mask


@dataclass(frozen=True, slots=True)
class Run:
    """Query t of [t0, t1) sees keys [lo, hi - (t1 - 1 - t)) of its sequence, the last `window` of them if that is set.

    True for every sequence b of [b0, b1).
    """

    b0: int
    b1: int
    t0: int
    t1: int
    lo: int
    hi: int
    window: int | None


def causal_runs(mask: Tensor) -> list[Run] | None:
    """The runs that a mask [B, 1, T, S] of booleans (true: seen) consists of, or None if it does not.

    Rows that see nothing are in no run. Waits for the device that holds the mask.
    """
    B, heads, T, _ = mask.shape
    ranges = _ranges(mask[:, 0]) if heads == 1 else None
    if ranges is None:
        return None
    first, end = ranges
    pieces = [_pieces(first[b], end[b]) for b in range(B)]
    runs: list[Run] = []
    for same, sequences in groupby(range(B), key=pieces.__getitem__):
        if same is None:
            return None
        b = list(sequences)
        runs += [Run(b[0], b[-1] + 1, *piece) for piece in same]
    return runs if len(runs) <= max(B, B * T // ROWS) else None


def _ranges(seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """First key and end of each row's range, both [B, T] on the CPU; None unless each row of [B, T, S] is one range."""
    first = seen.view(torch.uint8).argmax(-1)  # the first of equal values; 0 in rows of zeros
    end = first + seen.sum(-1, dtype=torch.int32)
    column = torch.arange(seen.shape[2], device=seen.device)
    if not torch.equal(seen, (column >= first[..., None]) & (column < end[..., None])):
        return None
    return first.cpu(), end.cpu()


def _pieces(first: Tensor, end: Tensor) -> list[tuple[int, int, int, int, int | None]] | None:
    """One sequence's runs as (t0, t1, lo, hi, window) from its rows' ranges, both [T]."""
    blind = first == end
    step = first.diff()
    goes_on = (end.diff() == 1) & ((step == 0) | (step == 1)) & ~blind[1:] & ~blind[:-1]
    goes_on |= blind[1:] & blind[:-1]
    starts = torch.cat([first.new_zeros(1), (~goes_on).nonzero().flatten() + 1]).tolist()
    pieces = []
    for t0, t1 in pairwise([*starts, first.shape[0]]):
        if blind[t0]:
            continue
        lo, slides = int(first[t0]), bool(first[t1 - 1] != first[t0])
        window = int((end - first)[t0:t1].max()) if slides else None
        if window is not None and not torch.equal(first[t0:t1], (end[t0:t1] - window).clamp(min=lo)):
            return None
        pieces.append((t0, t1, lo, int(end[t1 - 1]), window))
    return pieces
