"""Every message of a round with fixed keys, byte for byte as in golden.json, and what its fields must be."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.filtration import Filtration, Hash
from anabranch.aggregate.secure.messages import Malformed
from anabranch_kernels.field_coding.op import FIELDS

GOLDEN = Path(__file__).with_name("golden.json")
SHOWN = "babybear direct V2"  # in full; of the others the digests
CASES = [f"{field} {mode} {proof}" for field in FIELDS for mode in ("direct", "mask") for proof in ("V1", "V2")]


def record(session, case):
    """The first message of each kind."""
    field, mode, proof = case.split()
    made = session(
        N=5, length=4, blocks=2, privacy=1, dropouts=0, met=False, field=FIELDS[field], mode=mode, proof=proof
    )
    found = {}

    def wire(client, to_server, message):
        found.setdefault(type(made.message(message)).__name__, message)
        return message

    for client in made.clients.values():
        made.server.receive(wire(0, True, client.hello()))
    for i, roster in made.server.advance().items():
        made.clients[i].receive(wire(i, False, roster))
    made.check(made.round(1, wire))
    if case == SHOWN:
        server, clients = made.filters(Filtration(classes=3, bits=5), 2)
        bits = torch.tensor([[True, False, True, False, True], [True] * 5, [False] * 5])
        local.run_filter(server, clients, dict.fromkeys(clients, Hash(bits, torch.ones(3, dtype=torch.bool))), wire)
    text = {kind: message.hex() if case == SHOWN else sha256(message).hexdigest() for kind, message in found.items()}
    return {"parameters": made.parameters.digest.hex(), **text}


def test_messages_are_those_of_the_file(session, tmp_path):
    """They come out of fields, codes, keys, signatures and CBOR: whoever changes one of these speaks to nobody else."""
    found = {case: record(session, case) for case in CASES}
    new = tmp_path / "golden.json"
    new.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text()), f"if a new version of the protocol is meant, keep {new}"
    kinds = {kind for case in found.values() for kind in case}
    assert kinds == {"parameters", *(kind.__name__ for kind in m.KINDS)}


@pytest.fixture
def parameters(session):
    return session(met=False).parameters


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (m.Commit, [bytes(31)]),
        (m.Commits, [[0, 1], [bytes(32)], [bytes(64)] * 2]),
        (m.Commits, [[1, 0], [bytes(32)] * 2, [bytes(64)] * 2]),
        (m.Reveal, [bytes(32), bytes(31), b""]),
        (m.Reveal, [bytes(32), bytes(32), bytes(1001)]),
        (m.Reveal, [bytes(32), bytes(32), 5]),
        (m.Reveals, [[0], [bytes(32)], [bytes(32)], [b"", b""], [bytes(64)]]),
        (m.Reveals, [[0], [bytes(32)], [bytes(32)], ["x"], [bytes(64)]]),
        (m.Hello, []),
        (m.Hello, [bytes(31)]),
        (m.Hello, ["x" * 32]),
        (m.Hello, [bytes(32), 0]),
        (m.Hello, bytes(32)),
        (m.Shares, [[1, 1]]),
        (m.Shares, [[2, 1]]),
        (m.Shares, [[9]]),
        (m.Shares, [[-1]]),
        (m.Shares, [[True]]),
        (m.Shares, [list(range(10))]),
        (m.Check, [[0], [[1]]]),
        (m.Check, [[0], [[1, "x" * 201]]]),
        (m.Check, [[0], [[1, b"x"]]]),
        (m.Check, [[0], [[1, "a"], [1, "b"]]]),
        (m.Roster, [[0, 1], [bytes(32)], [bytes(64)] * 2]),
        (m.Delivery, [[0], ["header"], [bytes(64)]]),
        (m.Delivery, [[0], [], [bytes(64)]]),
        (m.Projection, [bytes(32), 1]),  # of a masked vector, in direct mode
        (m.Proof, [[0], [bytes(64)], [], [0], []]),
        (m.Proof, [[0], [bytes(64)], [], [], [0]]),
    ],
)
def test_bodies_that_are_none(parameters, kind, body):
    with pytest.raises(Malformed):
        kind.of(body, parameters)


def test_projections_of_masked_vectors_come_from_members(session):
    parameters = session(met=False, mode="mask").parameters
    with pytest.raises(Malformed, match="cannot be"):
        m.Proof.of([[0], [bytes(64)], [], [1], []], parameters)
    assert m.Proof.of([[0], [bytes(64)], [], [0], [1]], parameters).lengths(parameters) == (16, 48, 60)
