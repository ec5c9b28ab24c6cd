"""What the server refuses, whom it waits for, and that too few answers can be waited for."""

import pytest

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.wire import read, write


def forged(made, sender, data, change):
    """A client's message with another body and other parts, signed by that client."""
    frame = read(data, made.parameters)
    parts = [bytes(part) for part in frame.parts]
    message = change(frame.header.message, parts)
    return write(
        message, parts, parameters=made.parameters, identity=made.identities[sender], number=frame.header.number,
        sender=sender, recipient=len(made.clients),
    ).encode()  # fmt: skip


def test_it_waits_and_goes_on(session):
    made = session(met=False)
    for i in range(6):
        made.server.receive(made.clients[i].hello())
    assert made.server.waiting_for == (6, 7, 8)
    with pytest.raises(ProtocolError, match="server: has 6 Hellos; 7 are needed"):
        made.server.advance()
    made.server.receive(made.clients[8].hello())
    assert made.server.waiting_for == (6, 7)
    for i, roster in made.server.advance().items():
        made.clients[i].receive(roster)
    assert made.server.waiting_for == ()
    with pytest.raises(ProtocolError, match="no round is under way"):
        made.server.advance()
    made.clients = {i: one for i, one in made.clients.items() if i not in (6, 7)}
    outcome = made.round()
    made.check(outcome)
    assert outcome.excluded == ((6, "sent no Shares"), (7, "sent no Shares"))


def test_rounds_count_upwards(session):
    with pytest.raises(ProtocolError, match="no session keys"):
        session(met=False).server.begin(1)
    made = session()
    made.server.begin(4)
    with pytest.raises(ProtocolError, match="round 4 does not come after round 4"):
        made.server.begin(4)


def test_a_round_may_be_given_up(session):
    made = session()
    made.run_to(m.Quorum, 1)
    made.check(made.round(2))


def test_late_sums_do_not_enter_a_later_round(session):
    made = session()
    late = made.clients[0].receive(made.run_to(m.Quorum, 1)[0])
    made.run_to(m.Quorum, 2)
    with pytest.raises(ProtocolError, match="client 0: sent Sum of round 1; Sum of round 2 is due"):
        made.server.receive(late)


def test_answers_about_something_else(session):
    made = session()
    checks = {i: made.clients[i].receive(one) for i, one in made.run_to(m.Delivery).items()}
    made.server.begin(2)
    with pytest.raises(ProtocolError, match="client 2: sent Check of round 1; Shares of round 2 is due"):
        made.server.receive(checks[2])
    made = session()
    quiet = made.clients.pop(8)
    checks = {i: made.clients[i].receive(one) for i, one in made.run_to(m.Delivery).items()}
    made.clients[8] = quiet

    def about_8(check, parts):
        return m.Check((*check.owners[:-1], 8), ())

    with pytest.raises(ProtocolError, match="client 2: speaks of vectors that were not shared"):
        made.server.receive(forged(made, 2, checks[2], about_8))
    made.server.receive(checks[2])


@pytest.mark.parametrize("settings", [{"mode": "mask"}, {"proof": "V1"}])
def test_vectors_and_tags_must_be_canonical(session, settings):
    made = session(**settings)
    made.server.begin(1)
    shares = made.clients[0].share(1, made.vectors[0])

    def large(message, parts):
        parts[-1] = b"\xff" * len(parts[-1])
        return message

    with pytest.raises(ProtocolError, match="client 0: its masked vector or its tag"):
        made.server.receive(forged(made, 0, shares, large))
    made.server.receive(shares)


@pytest.mark.parametrize("step", [m.Check, m.Sum, m.Projection], ids=lambda step: step.__name__)
def test_letters_that_are_not_canonical_do_not_count(session, step):
    """They are as good as missing; the client that sends them is one of the E or D."""
    made = session()

    def wire(client, to_server, data):
        if client == 4 and to_server and isinstance(made.message(data), step):
            return forged(
                made, 4, data, lambda message, parts: parts.__setitem__(0, b"\xff" * len(parts[0])) or message
            )
        return data

    made.check(made.round(wire=wire))


def test_owners_that_lie_about_their_masked_vector_are_treated_as_silent(session):
    made = session(mode="mask")
    proofs = {}

    def wire(client, to_server, data):
        message = made.message(data)
        if client == 4 and to_server and isinstance(message, m.Projection):
            return forged(made, 4, data, lambda message, parts: parts.__setitem__(1, bytes(len(parts[1]))) or message)
        if isinstance(message, m.Proof):
            proofs[client] = message
        return data

    made.check(made.round(wire=wire))
    assert {message.late for message in proofs.values()} == {(4,)}
    assert len(made.finished()) == 9


def test_another_server(session):
    made = session(met=False)
    with pytest.raises(ValueError, match="another server"):
        Server(made.parameters, Identity())
