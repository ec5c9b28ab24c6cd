"""A mean of updates as one sum of which the server sees nothing else (anabranch.aggregate.secure).

    clients   share round(clip(D_k) 2^bits)        D_k: what client k changed in the W models, n_k: its samples
    server    w + sum_k n_k D_k / sum_k n_k         the numbers of samples are no secrets, they are the sum's weights

So any method whose server needs no more than the mean can be carried. What comes out has to be, bit for bit, the sum of
the quantised updates; it is apart from the plain mean by 2^-(bits + 1) at most where nothing is clipped.

A robust aggregate can be one such sum, too. The geometric median is a weighted mean, its weights the inverse distances
of the updates. So is each step towards it in RFA (arXiv 1912.13445), whose clients know their own distances; here the
last of them is taken, with whole numbers as weights.
"""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.outcome import elements_of
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.sums import SumSettings
from anabranch.federated import options
from anabranch.federated.method import FedAvg, Replies, changes

LARGEST_WEIGHT = 64
# Of a round's updates: the weights are samples, so sums are of many bits.
DEFAULTS = {"field": "goldilocks", "clip": 8.0, "fraction_bits": 24}


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


def secure_mean(updates: Tensor, weights: Sequence[int], settings: SumSettings) -> Private:
    """The mean of updates [N, D], weighted by whole numbers from 1 on, with all parties in this process.

    Raises ValueError for fewer clients than the settings ask for, for weights that overflow the field, and for updates
    that are not finite.
    """
    N = len(updates)
    identities = [Identity() for _ in range(N + 1)]
    parameters = settings.parameters(
        [identity.public for identity in identities[:N]],
        identities[N].public,
        length=updates.shape[1],
        weights=tuple(weights),
    )
    key = secrets.token_bytes(32) if settings.proof == "V1" else None
    clients = {i: Client(parameters, i, identities[i], group_key=key) for i in range(N)}
    server = Server(parameters, identities[N])
    local.meet(server, clients)
    local.run_round(server, clients, 1, dict(enumerate(updates)))
    outcome = server.outcome
    assert outcome is not None  # the round goes on until there is one
    received = [outcome, *(client.outcome for client in clients.values())]
    scaled = updates.double() * 2**settings.fraction_bits
    largest = settings.clip * 2**settings.fraction_bits
    whole = scaled.clamp(-largest, largest).round().long()  # halves to even, as `quantise` rounds
    plain = elements_of(
        sum((w * whole[i] for i, w in zip(outcome.accepted, outcome.weights, strict=True)), whole.new_zeros(())),
        parameters.field,
    )
    return Private(
        update=outcome.mean(parameters),
        accepted=outcome.accepted,
        weights=outcome.weights,
        proof=outcome.proof,
        is_exact=all(each is not None and bool((each.sum == plain).all()) for each in received),
        clipped=int((scaled[list(outcome.accepted)].abs() > largest).sum()),
    )


def aggregate_privately(updates: Tensor, coefficients: Tensor) -> Private:
    """The mean of updates [N, D], float32, weighted by coefficients [N] >= 0 in steps of 1/64 of the largest, one at
    least. Raises ValueError for fewer than three clients.
    """
    N = len(updates)
    weights = (LARGEST_WEIGHT * coefficients / coefficients.max()).round().long().clamp_min(1).tolist()
    settings = SumSettings(
        blocks=max(1, N // 3), privacy=max(1, N // 5), errors=N // 20, dropouts=N // 10, clip=8.0, fraction_bits=16
    )
    return secure_mean(updates, weights, settings)


def sum_settings(text: str) -> SumSettings:
    """Of `privacy=2,dropouts=1`; what is not said is as in DEFAULTS and SumSettings."""
    given = options.pairs_of(text.split(","))
    return options.make(SumSettings, {**DEFAULTS, **given}, what="secure")


def beyond_sums(method: FedAvg) -> list[str]:
    """What a method's server learns of single clients beside their numbers of samples; nothing where sums are enough.

    FedExP needs a length of each update: one number, but one of each client, so it is not carried.
    """
    steps = {
        "survey": "asks each client something (survey)",
        "reply": "gets more than a model from each client (reply)",
        "aggregate": "makes more of the replies than their mean (aggregate)",
    }
    ruled = ["takes a robust rule for the mean (mean)"] if method.mean is not None else []
    return [*ruled, *(steps[step] for step in changes(method, *steps))]


class SecureSums:
    """The mean of each round of a federation, by a secure sum.

    clipped  numbers that were, in the latest round
    """

    def __init__(self, settings: SumSettings, method: FedAvg, cohort: int) -> None:
        """Raises ValueError for methods that need more than sums, and for cohorts that are too small."""
        if beyond := beyond_sums(method):
            raise ValueError(
                f"secure sums cannot carry {type(method).__name__}, whose server {' and '.join(beyond)}; take a method "
                f"that needs nothing but the mean of the models"
            )
        if cohort < settings.least_clients:
            raise ValueError(
                f"these sums need {settings.least_clients} clients in a round, a cohort has {cohort}: let more take "
                "part, or lower blocks, privacy, errors or dropouts"
            )
        self.settings = settings
        self.clipped = 0

    def carry(self, model: Tensor, replies: Replies) -> Replies:
        """The replies to a model [W, D] with a mean that was summed securely, and without the models."""
        assert replies.models is not None
        updates = replies.models.double() - model.double()
        private = secure_mean(updates.flatten(1), replies.counts.tolist(), self.settings)
        assert private.is_exact
        self.clipped = private.clipped
        return replies._replace(models=None, mean=(model.double() + private.update.view(model.shape)).float())
