"""A robust aggregate once more, as one sum of which the server sees nothing else (anabranch.aggregate.secure).

The geometric median is a weighted mean, its weights the inverse distances of the updates. So is each step towards it in
RFA (arXiv 1912.13445), whose clients know their own distances; here the last of them is taken, with whole numbers as
weights. What comes out has to be, bit for bit, the sum of the quantised updates.
"""

import secrets
from typing import NamedTuple

from torch import Tensor

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.server import Server
from anabranch_kernels.field_coding.op import FixedPoint

FIXED_POINT = FixedPoint(clip=8.0, fraction_bits=16)
LARGEST_WEIGHT = 64


class Private(NamedTuple):
    """update      [D] float64, the weighted mean
    accepted    the clients in it
    weights     theirs, whole numbers
    proof       what the clients checked of the sum; see Parameters
    is_exact    every client got the sum of the quantised updates, bit for bit
    clipped     numbers of the accepted updates beyond what is quantised
    """

    update: Tensor
    accepted: tuple[int, ...]
    weights: tuple[int, ...]
    proof: str
    is_exact: bool
    clipped: int


def aggregate_privately(updates: Tensor, coefficients: Tensor) -> Private:
    """The mean of updates [N, D], float32, weighted by coefficients [N] >= 0 in steps of 1/64 of the largest, one at
    least. Raises ValueError for fewer than three clients.
    """
    N = len(updates)
    weights = tuple((LARGEST_WEIGHT * coefficients / coefficients.max()).round().long().clamp_min(1).tolist())
    identities = [Identity() for _ in range(N + 1)]
    parameters = Parameters(
        session=secrets.token_bytes(32),
        identities=tuple(identity.public for identity in identities[:N]),
        server=identities[N].public,
        length=updates.shape[1],
        fixed_point=FIXED_POINT,
        blocks=max(1, N // 3),
        privacy=max(1, N // 5),
        errors=N // 20,
        dropouts=N // 10,
        weights=weights,
    )
    clients = {i: Client(parameters, i, identities[i]) for i in range(N)}
    server = Server(parameters, identities[N])
    local.meet(server, clients)
    local.run_round(server, clients, 1, dict(enumerate(updates)))
    outcome = server.outcome
    assert outcome is not None  # the round goes on until there is one
    received = [outcome, *(client.outcome for client in clients.values())]
    scaled = updates.double() * 2**FIXED_POINT.fraction_bits
    largest = FIXED_POINT.clip * 2**FIXED_POINT.fraction_bits
    whole = scaled.clamp(-largest, largest).round().long()  # halves to even, as `quantise` rounds
    plain = sum(w * whole[i] for i, w in zip(outcome.accepted, outcome.weights, strict=True)) % parameters.field.p
    return Private(
        update=outcome.mean(parameters),
        accepted=outcome.accepted,
        weights=outcome.weights,
        proof=outcome.proof,
        is_exact=all(each is not None and bool((each.sum.long() == plain).all()) for each in received),
        clipped=int((scaled[list(outcome.accepted)].abs() > largest).sum()),
    )
