"""What a round leaves behind, and the set of owners that all parties must see alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anabranch.aggregate.secure.errors import ProtocolError, cbor
from anabranch.aggregate.secure.parameters import Mode, Parameters, Proof
from anabranch.aggregate.secure.proof import digest_of
from anabranch_kernels.field_coding.op import Field, dequantise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The sum of one round, and how much it is worth.

    number     of the round
    sum        [l] elements: sum of weight times quantised vector
    accepted   the clients in the sum, in rising order
    weights    theirs
    excluded   the other clients, and why, in the server's words
    wrong      clients whose coded sums or projections were wrong, by the server's word; nothing of theirs was used
    clipped    how many numbers of the own vector were clipped; None for the server, which cannot know
    mode       of sharing
    proof      what was checked: see Parameters
    """

    number: int
    sum: Tensor
    accepted: tuple[int, ...]
    weights: tuple[int, ...]
    excluded: tuple[tuple[int, str], ...]
    wrong: tuple[int, ...]
    clipped: int | None
    mode: Mode
    proof: Proof

    def mean(self, parameters: Parameters) -> Tensor:
        """The weighted mean of the accepted vectors: [l] float64."""
        return dequantise(self.sum, parameters.field, parameters.fixed_point, total_weight=sum(self.weights))


def elements_of(whole: Tensor, field: Field) -> Tensor:
    """Integers within half the field, int64, as its elements: what a sum that went well consists of."""
    negative = field.p - (1 << 64) if field.p >= 1 << 63 else field.p  # Goldilocks' are bits of 64
    return torch.where(whole < 0, whole + negative, whole).to(field.dtype)


@dataclass(frozen=True, kw_only=True)
class View:
    """Whose vectors go into the sum of a round, with which weights, shared by which messages.

    commitments  digest of the Shares of each accepted client
    suspects     clients whose word does not count in this round
    """

    number: int
    accepted: tuple[int, ...]
    weights: tuple[int, ...]
    commitments: tuple[bytes, ...]
    suspects: tuple[int, ...]
    excluded: tuple[tuple[int, str], ...]

    @cached_property
    def digest(self) -> bytes:
        """What the clients sign; reasons are not part of it."""
        plain = [list(each) for each in (self.accepted, self.weights, self.commitments, self.suspects)]
        encoded: bytes = cbor().dumps([self.number, *plain], canonical=True)
        return digest_of("view", encoded)


def check_view(view: View, parameters: Parameters) -> None:
    """Raises ProtocolError for sets that would say too much about one vector or that nobody could check."""
    if len(view.accepted) < parameters.least_owners:
        raise ProtocolError(
            "server", f"{len(view.accepted)} vectors in the sum; T + 2 = {parameters.least_owners} are needed"
        )
    if len(view.suspects) > parameters.errors:
        raise ProtocolError("server", f"{len(view.suspects)} suspects; E = {parameters.errors} are allowed")


def correctable(members: Sequence[int], parameters: Parameters) -> int:
    """How many of these clients' letters may be wrong and the words still be sure.

    E of them may lie. A polynomial within e letters of a word is right if n - e - E >= K + T honest letters lie on it.
    Raises ProtocolError if there are too few letters to notice E wrong ones.
    """
    spare = len(members) - parameters.code.threshold - parameters.errors
    if spare < 0:
        needed = parameters.code.threshold + parameters.errors
        raise ProtocolError("server", f"{len(members)} answers; K + T + E = {needed} are needed")
    return min(parameters.errors, spare)
