"""A round with all parties in one process: for tests, measurements and trying out."""

from collections.abc import Callable, Mapping

from torch import Tensor

from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.server import Server

Wire = Callable[
    [int, bool, bytes], bytes | None
]  # client, whether to the server, message: what arrives, None for nothing


def whole(client: int, to_server: bool, message: bytes) -> bytes | None:
    """A wire that changes nothing."""
    return message


def meet(server: Server, clients: Mapping[int, Client]) -> None:
    """Exchange session keys."""
    for client in clients.values():
        server.receive(client.hello())
    for i, message in server.advance().items():
        clients[i].receive(message)


def run_round(
    server: Server, clients: Mapping[int, Client], number: int, vectors: Mapping[int, Tensor], wire: Wire = whole
) -> None:
    """All steps of one round; each party's `outcome` tells what came of it."""
    server.begin(number)
    answers = {i: client.share(number, vectors[i]) for i, client in clients.items()}
    while server.outcome is None:
        for i, answer in answers.items():
            if (arrived := wire(i, True, answer)) is not None:
                server.receive(arrived)
        outgoing = server.advance()
        answers = {}  # of the next step
        for i, message in outgoing.items():
            if (arrived := wire(i, False, message)) is not None:
                reply = clients[i].receive(arrived)
                if reply is not None:
                    answers[i] = reply
