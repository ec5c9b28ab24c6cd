"""Random numbers that depend on who asks and what for, never on who asked before: one stream for each client.

Philox 4x32-10 (Salmon et al., SC 2011), a counter-based generator: number i of a stream is a function of a key and i.
The key is (seed, client), the counter (i, round, purpose, part), so clients trained together, alone, in any order or
after a restart draw the same. For simulation, not for secrets.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
ROUNDS, HALF, MASK = 10, np.uint64(32), np.uint64(0xFFFFFFFF)
NOBODY = (1 << 32) - 1  # draws what is no client's, such as a round's cohort
HALVES = 2.0**-24  # float32 has as many numbers in [0, 1), all equally far apart


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    METHOD = 3


def philox(counter: Sequence[Words], key: Sequence[Words]) -> Words:
    """Four random 32-bit words of each counter [4, ...] under a key [2, ...], uint64 below 2^32: [4, ...]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(ROUNDS):
        if i:
            k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF) ^ c3 ^ k1, p0 & MASK
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


class Streams:
    """The streams of some clients [N] in one round."""

    def __init__(self, seed: int, clients: Tensor, round: int) -> None:
        self.clients, self.round = clients, round
        numbers = clients.numpy().astype(np.uint64)[:, None]
        self._key = np.full_like(numbers, seed), numbers

    def words(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] int64 in [0, 2^32). `part` tells draws of one purpose apart, such as epochs or steps."""
        blocks = np.arange(-(-count // 4), dtype=np.uint64)[None]
        counter = (blocks, *(np.full_like(blocks, n) for n in (self.round, purpose, part)))
        words = philox(counter, self._key).transpose(1, 2, 0).reshape(len(self.clients), -1)
        return torch.from_numpy(words[:, :count].astype(np.int64))

    def uniform(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] float32 in [0, 1)."""
        return (self.words(count, purpose, part) >> 8).float() * HALVES

    def normal(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] float32, by Box and Muller; like the others, a longer draw begins with the shorter one."""
        u, v = self.uniform(count + count % 2, purpose, part).unflatten(1, (-1, 2)).unbind(2)
        length, angle = torch.sqrt(-2 * torch.log1p(-u)), 2 * math.pi * v
        return torch.stack([length * angle.cos(), length * angle.sin()], 2).flatten(1)[:, :count]

    def order(self, counts: Tensor, longest: int, part: int) -> Tensor:
        """[N, longest] int64: the first counts[i] numbers of row i are 0 .. counts[i] - 1, shuffled; then the rest.

        Words that are equal, two in 4 billion, keep their order.
        """
        words = self.words(longest, Purpose.ORDER, part)
        beyond = torch.arange(longest) >= counts[:, None]
        return torch.where(beyond, words + (1 << 32), words).argsort(dim=1, stable=True)
