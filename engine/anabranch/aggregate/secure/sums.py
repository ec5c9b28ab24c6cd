"""What a secure sum is asked to hold, before it is known who takes part."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from anabranch.aggregate.secure.parameters import Mode, Parameters, Proof
from anabranch_kernels.field_coding.op import FIELDS, FixedPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class SumSettings:
    """See Parameters."""

    blocks: int = 1
    privacy: int = 1
    errors: int = 0
    dropouts: int = 0
    clip: float = 1.0
    fraction_bits: int = 20
    field: str = "babybear"
    mode: Mode = "direct"
    proof: Proof = "V2"

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot hold even with the fewest clients, all of weight one."""
        if self.field not in FIELDS:
            raise ValueError(f"unknown field {self.field!r}; choose one of {sorted(FIELDS)}")
        self.check(1)

    def check(self, weight: int) -> None:
        """Raises ValueError unless the fewest clients fit with weights of so much."""
        server, *clients = (i.to_bytes(32, "big") for i in range(self.least_clients + 1))
        self.parameters(clients, server, length=1, weights=(weight,) * len(clients))

    @property
    def least_clients(self) -> int:
        """N that K, T, E and D ask for; more will do as well, until their weights overflow the field."""
        K, T, E, D = self.blocks, self.privacy, self.errors, self.dropouts
        return max(D + K + T + 2 * E, D + T + 2, 2 * D + T + E + 1)  # the last: (N + T + E) // 2 + 1 <= N - D

    def parameters(
        self, identities: Iterable[bytes], server: bytes, *, length: int, weights: tuple[int, ...]
    ) -> Parameters:
        """A session that nobody has seen before."""
        return Parameters(
            session=secrets.token_bytes(32), identities=tuple(identities), server=server, length=length,
            fixed_point=FixedPoint(clip=self.clip, fraction_bits=self.fraction_bits), blocks=self.blocks,
            privacy=self.privacy, errors=self.errors, dropouts=self.dropouts, weights=weights,
            field=FIELDS[self.field], mode=self.mode, proof=self.proof,
        )  # fmt: skip
