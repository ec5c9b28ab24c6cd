"""A round with all parties in one process: for tests, measurements and trying out."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.filter_phase import ClientFilter, ServerFilter
from anabranch.aggregate.secure.filtration import Hash
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.wire import Part

Done = TypeVar("Done")
# client, whether to the server, message: what arrives, None for nothing
Wire = Callable[[int, bool, Part], Part | None]


class Watch(Protocol):
    """Sees all work of a round: of a "client", of the server to "receive" a message or to "advance"."""

    def __call__(self, what: str, work: Callable[[], Done]) -> Done: ...


def whole(client: int, to_server: bool, message: Part) -> Part | None:
    """A wire that changes nothing."""
    return message


def unwatched(what: str, work: Callable[[], Done]) -> Done:
    """Just does the work."""
    return work()


def meet(server: Server, clients: Mapping[int, Client]) -> None:
    """Exchange session keys."""
    for client in clients.values():
        server.receive(client.hello())
    for i, message in server.advance().items():
        clients[i].receive(message)


def run_filter(
    server: ServerFilter, clients: Mapping[int, ClientFilter], hashes: Mapping[int, Hash], wire: Wire = whole
) -> None:
    """The phase before a round; clients have hashed their logits by its beacon. Each party's `outcome` has the weights.

    Messages that a party refuses are lost.
    """
    answers = {i: client.commit(hashes[i]) for i, client in clients.items()}
    while server.outcome is None:
        for i, answer in answers.items():
            if (arrived := wire(i, True, answer)) is not None:
                with suppress(ProtocolError):
                    server.receive(arrived)
        answers = {}
        for i, message in server.advance().items():
            if (arrived := wire(i, False, message)) is not None:
                with suppress(ProtocolError):
                    reply = clients[i].receive(arrived)
                    if reply is not None:
                        answers[i] = reply


def run_round(
    server: Server,
    clients: Mapping[int, Client],
    number: int,
    vectors: Mapping[int, Tensor],
    wire: Wire = whole,
    watch: Watch = unwatched,
    filters: tuple[ServerFilter, Mapping[int, ClientFilter]] | None = None,
) -> None:
    """All steps of one round; each party's `outcome` tells what came of it.

    filters   after run_filter, for the weights; clients that have no verdict say nothing in the round
    """
    weights: dict[int, tuple[int, ...] | None] = dict.fromkeys(clients)
    if filters is None:
        server.begin(number)
    else:
        assert filters[0].outcome is not None
        server.begin(number, weights=filters[0].outcome.weights)
        weights = {i: one.outcome.weights for i, one in filters[1].items() if one.outcome is not None}
    answers: dict[int, Part] = {
        i: watch("client", partial(clients[i].share, number, vectors[i], weights=weights[i])) for i in weights
    }
    while server.outcome is None:
        for i in list(answers):
            if (arrived := wire(i, True, answers.pop(i))) is not None:
                watch("receive", partial(server.receive, arrived))
        outgoing = watch("advance", server.advance)
        for i in list(outgoing):
            if (arrived := wire(i, False, outgoing.pop(i))) is not None:
                reply = watch("client", partial(clients[i].receive, arrived))
                if reply is not None:
                    answers[i] = reply
