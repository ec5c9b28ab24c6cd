"""The prime fields that shares are coded over, and how many bits a sum may have in them."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Integers modulo a prime.

    name         in messages and golden vectors
    p            the prime
    generator    of the whole multiplicative group
    two_adicity  2^two_adicity divides p - 1: the longest number-theoretic transform
    dtype        of an element in memory, always canonical (0 <= element < p): int32 where p < 2^31, else int64, which
                 for Goldilocks holds the bits of an unsigned 64-bit integer
    """

    name: str
    p: int
    generator: int
    two_adicity: int
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return self.p.bit_length()

    @property
    def bytes(self) -> int:
        """Of one element, in memory and in messages (little-endian)."""
        return self.dtype.itemsize


BABYBEAR = Field(name="babybear", p=15 * 2**27 + 1, generator=31, two_adicity=27, dtype=torch.int32)
KOALABEAR = Field(name="koalabear", p=2**31 - 2**24 + 1, generator=3, two_adicity=24, dtype=torch.int32)
M31 = Field(name="m31", p=2**31 - 1, generator=7, two_adicity=1, dtype=torch.int32)
GOLDILOCKS = Field(name="goldilocks", p=2**64 - 2**32 + 1, generator=7, two_adicity=32, dtype=torch.int64)
F50 = Field(name="f50", p=2**50 - 27, generator=6, two_adicity=2, dtype=torch.int64)
FIELDS = {field.name: field for field in (BABYBEAR, KOALABEAR, M31, GOLDILOCKS, F50)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPoint:
    """Real numbers as integers of a field: x -> round(clip(x, -clip, clip) * 2^fraction_bits).

    clip           largest magnitude that is kept
    fraction_bits  of the integer
    """

    clip: float
    fraction_bits: int

    def __post_init__(self) -> None:
        if not 0 < self.clip < 2**62 or not 0 <= self.fraction_bits <= 62:
            raise ValueError(f"need 0 < clip < 2^62 and 0..62 fraction bits, got {self.clip}, {self.fraction_bits}")

    @property
    def largest(self) -> int:
        """Magnitude of the largest integer that a number becomes."""
        return ceil(Fraction(self.clip) * (1 << self.fraction_bits))

    def check_budget(self, field: Field, total_weight: int) -> None:
        """Refuse sums that could wrap around: total_weight * largest must be at most (p - 1) / 2."""
        budget = (field.p - 1) // 2
        if total_weight < 1 or total_weight * self.largest > budget:
            raise ValueError(
                f"a total weight of {total_weight} needs sums up to {total_weight * self.largest}, field {field.name} "
                f"holds {budget}: at most a weight of {budget // self.largest} fits clip={self.clip} with "
                f"{self.fraction_bits} fraction bits"
            )
