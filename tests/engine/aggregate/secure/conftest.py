"""Sessions of a few clients, and what their sums must be in plain integers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from typing import Any

import pytest
import torch

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.filter_phase import ClientFilter, ServerFilter
from anabranch.aggregate.secure.filtration import Filtration
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.messages import Message
from anabranch.aggregate.secure.outcome import Outcome
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.wire import read, write
from anabranch.federated.digits import load_digits
from anabranch.federated.gathering import first_server, open_visit, pay
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import pack
from anabranch.federated.schedule import Schedule
from anabranch_kernels.field_coding.op import BABYBEAR, FixedPoint


@dataclass
class Session:
    """All parties, and a vector for each client."""

    parameters: Parameters
    identities: list[Identity]  # the server's is the last
    server: Server
    clients: dict[int, Client]
    vectors: dict[int, torch.Tensor]

    def round(self, number: int = 1, wire: local.Wire = local.whole) -> Outcome:
        local.run_round(self.server, self.clients, number, self.vectors, wire)
        assert self.server.outcome is not None
        return self.server.outcome

    def filters(self, settings: Filtration, number: int = 1) -> tuple[ServerFilter, dict[int, ClientFilter]]:
        """The phase before a round, for parties that have met."""
        assert self.server.roster is not None
        server = ServerFilter(self.parameters, self.identities[-1], number, self.server.roster, settings)
        clients = {}
        for i, client in self.clients.items():
            assert client.roster is not None
            clients[i] = ClientFilter(
                self.parameters, i, self.identities[i], number, client.roster, settings,
                randomness=randomness(f"filter {i} {number}"),
            )  # fmt: skip
        return server, clients

    def run_to(self, kind: type[Message], number: int = 1) -> dict[int, bytes]:
        """A round up to the server's messages of this kind, which are returned and not delivered."""
        self.server.begin(number)
        answers = {i: client.share(number, self.vectors[i]) for i, client in self.clients.items()}
        while True:
            for answer in answers.values():
                self.server.receive(answer)
            outgoing = self.server.advance()
            if all(type(self.message(one)) is kind for one in outgoing.values()):
                return outgoing
            replies = {i: self.clients[i].receive(one) for i, one in outgoing.items()}
            answers = {i: reply for i, reply in replies.items() if reply is not None}

    def message(self, data: bytes) -> Any:
        return read(data, self.parameters).header.message

    def expected(self, accepted: tuple[int, ...]) -> list[int]:
        """The sum in Python's integers, modulo p."""
        p, scale = self.parameters, 1 << self.parameters.fixed_point.fraction_bits
        rows = [[p.all_weights[i] * round(Fraction(x) * scale) for x in self.vectors[i].tolist()] for i in accepted]
        return [sum(column) % p.field.p for column in zip(*rows, strict=True)]

    def finished(self) -> dict[int, Outcome]:
        return {i: client.outcome for i, client in self.clients.items() if client.outcome is not None}

    def check(self, outcome: Outcome) -> None:
        """The sum is exact, and everybody who has one has the same."""
        found = [x % 2**64 if x < 0 else x for x in outcome.sum.tolist()]
        assert found == self.expected(outcome.accepted)
        assert all(torch.equal(one.sum, outcome.sum) for one in self.finished().values())

    def forge(self, data: bytes, change: Callable[[Any, list[bytes]], Any]) -> bytes:
        """A message of the server with another body and other parts, signed by the server as its own."""
        frame = read(data, self.parameters)
        parts = [bytes(part) for part in frame.parts]
        message = change(frame.header.message, parts)
        return write(
            message, parts, parameters=self.parameters, identity=self.identities[-1], number=frame.header.number,
            sender=frame.header.sender, recipient=frame.header.recipient,
        ).encode()  # fmt: skip


def randomness(seed: str) -> Callable[[int], bytes]:
    """Bytes that look random and are the same each time."""
    count = 0

    def bytes_of(length: int) -> bytes:
        nonlocal count
        count += 1
        return sha256(f"{seed}/{count}".encode()).digest()[:length]

    return bytes_of


@pytest.fixture(scope="session")
def session() -> Callable[..., Session]:
    """`session(N=9, kinds={3: Liar}, proof="V1")`: parties that have met."""

    def make(
        N: int = 9, length: int = 13, kinds: Mapping[int, type[Client]] | None = None, met: bool = True,
        server_kind: type[Server] = Server, **changes: Any,
    ) -> Session:  # fmt: skip
        identities = [Identity(sha256(f"identity {i}".encode()).digest()) for i in range(N + 1)]
        settings: dict[str, Any] = {
            "session": sha256(b"session").digest(), "identities": tuple(one.public for one in identities[:N]),
            "server": identities[N].public, "length": length, "field": BABYBEAR,
            "fixed_point": FixedPoint(clip=1.0, fraction_bits=16),
            "blocks": 3, "privacy": 2, "errors": 1, "dropouts": 2,
        }  # fmt: skip
        parameters = Parameters(**(settings | changes))
        key = sha256(b"group").digest() if parameters.proof == "V1" else None
        clients = {
            i: (kinds or {}).get(i, Client)(
                parameters, i, identities[i], group_key=key, randomness=randomness(f"client {i}")
            )
            for i in range(N)
        }
        server = server_kind(parameters, identities[N], randomness=randomness("server"))
        numbers = random.Random(N * 1000 + length)
        vectors = {i: torch.tensor([numbers.uniform(-1, 1) for _ in range(length)]) for i in range(N)}
        made = Session(parameters, identities, server, clients, vectors)
        if met:
            local.meet(server, clients)
        return made

    return make


@pytest.fixture(scope="session")
def trained_alone() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What clients that learned digits by themselves say of those that nobody has: logits [N, 449, 10], and the labels.

    A hundred steps of gradient descent on all of a client's own.
    """

    def train_alone(clients: int, *, skew: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        digits = load_digits(clients, skew=skew, generator=torch.Generator().manual_seed(seed))
        C, n = digits.y.shape
        network, method, numbers = MLP((64, 32, 10)), FedAvg(), torch.arange(C)
        schedule = Schedule(epochs=100, batch=n, lr=0.5, momentum=0.0, weight_decay=0.0)
        visit = open_visit(
            method, network, schedule, round=0, clients=numbers,
            data=pack(digits.x.flatten(0, 1), digits.y.flatten(), list(torch.arange(C * n).split(n))),
            received=first_server(method, network, C, seed)["model"].repeat_interleave(C, 0), sent={}, kept=[],
        )  # fmt: skip
        rows, _ = pay(method, visit)
        return forward(network, rows, digits.test_x.expand(C, -1, -1)).logits, digits.test_y

    return train_alone
