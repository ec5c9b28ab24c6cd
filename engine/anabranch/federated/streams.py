"""Random numbers that depend on who asks and what for, never on who asked before: one stream for each client.

Philox 4x32-10 (Salmon et al., SC 2011), a counter-based generator: number i of a stream is a function of a key and i.
The key is (seed, client), the counter (i, round, purpose, part), so clients trained together, alone, in any order or
after a restart draw the same. For simulation, not for secrets.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS, MASK = 10, 0xFFFFFFFF
HALVES = 2.0**-24  # float32 has as many numbers in [0, 1), all equally far apart


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    METHOD = 3


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Four random 32-bit words of each counter [..., 4] under a key [..., 2], all int64 in [0, 2^32): [..., 4]."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for i in range(ROUNDS):
        if i:
            k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product; int64 wraps around, which leaves its 64 bits right."""
    product = a * (b - (1 << 64) if b >= 1 << 63 else b)
    return (product >> 32) & MASK, product & MASK


class Streams:
    """The streams of some clients [N] in one round."""

    def __init__(self, seed: int, clients: Tensor, round: int) -> None:
        self.clients, self.round = clients, round
        self._key = torch.stack([torch.full_like(clients, seed & MASK), clients & MASK], -1)[:, None]

    def words(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] int64 in [0, 2^32). `part` tells draws of one purpose apart, such as epochs or steps."""
        blocks = torch.arange(-(-count // 4))
        counter = torch.stack([blocks, *(torch.full_like(blocks, n) for n in (self.round, purpose, part))], -1)
        return philox(counter[None], self._key).flatten(1)[:, :count]

    def uniform(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] float32 in [0, 1)."""
        return (self.words(count, purpose, part) >> 8).float() * HALVES

    def normal(self, count: int, purpose: Purpose, part: int = 0) -> Tensor:
        """[N, count] float32, by Box and Muller."""
        u, v = self.uniform(2 * count, purpose, part).split(count, 1)
        return torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * math.pi * v)

    def order(self, counts: Tensor, longest: int, part: int) -> Tensor:
        """[N, longest] int64: the first counts[i] numbers of row i are 0 .. counts[i] - 1, shuffled; then the rest.

        Words that are equal, two in 4 billion, keep their order.
        """
        words = self.words(longest, Purpose.ORDER, part)
        beyond = torch.arange(longest) >= counts[:, None]
        return torch.where(beyond, words + MASK + 1, words).argsort(dim=1, stable=True)
