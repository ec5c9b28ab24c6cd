"""Clients that are taken apart and put together again between any two messages."""

import pytest

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.resumable import Once, ResumableClient
from anabranch.aggregate.secure.wire import read

SHARED = b"g" * 32


class Restless:
    """A client that lives for one message at a time."""

    def __init__(self, client, session, once=None):
        self.parameters, self.identity, self.once = session.parameters, session.identities[client.index], once
        self.group_key = client._group_key
        self.state, self.outcome, self.sizes = client.state(), None, []

    def _do(self, what, *arguments, **settings):
        client = ResumableClient.resume(self.state, self.parameters, self.identity, group_key=self.group_key)
        answer = getattr(client, what)(*arguments, **settings)
        if self.once and what != "hello":  # which may be said again
            self.once.take(self.state)
        self.state, self.outcome = client.state(), client.outcome
        self.sizes.append(len(self.state))
        return answer

    def hello(self):
        return self._do("hello")

    def share(self, number, vector, **settings):
        return self._do("share", number, vector, **settings)

    def receive(self, message):
        return self._do("receive", message)


def restless(session, tmp_path=None, **settings):
    made = session(kinds=dict.fromkeys(range(9), ResumableClient), met=False, **settings)
    once = Once(tmp_path / "once") if tmp_path else None
    made.clients = {i: Restless(client, made, once) for i, client in made.clients.items()}
    local.meet(made.server, made.clients)
    return made


@pytest.mark.parametrize("mode", ["direct", "mask"])
@pytest.mark.parametrize("proof", ["V0", "V1", "V2"])
def test_rounds_of_clients_that_are_resumed_for_each_message(session, mode, proof, tmp_path):
    made = restless(session, tmp_path, mode=mode, proof=proof)
    for number in (1, 2):

        def wire(client, to_server, message):  # client 8 falls silent before it agrees
            kind = type(read(message, made.parameters).header.message)
            return None if client == 8 and to_server and kind in (m.Agreement, m.Sum, m.Projection) else message

        outcome = made.round(number, wire)
        made.check(outcome)
        assert outcome.accepted == tuple(range(9))
        assert len(made.finished()) == 8
        assert {(one.accepted, one.proof, one.clipped) for one in made.finished().values()} == {
            (tuple(range(9)), proof, 0)
        }


def test_a_state_grows_by_the_shares_it_holds_and_shrinks_with_their_sum(session):
    made = restless(session, length=60000)
    made.round()
    after_hello, after_roster, *sizes = made.clients[0].sizes
    share = made.parameters.share_length * 4
    assert after_hello < after_roster < 2000
    assert [round(size / share) for size in sizes] == [1, 9, 9, 1, 4, 0]  # headers are small beside shares


def test_a_state_is_of_one_session(session):
    made = session(kinds={0: ResumableClient})
    other = session(kinds={0: ResumableClient}, length=14)
    with pytest.raises(ValueError, match="another session"):
        ResumableClient.resume(made.clients[0].state(), other.parameters, other.identities[0])


def test_a_state_answers_once(session, tmp_path):
    """Else two vectors would be sealed with the same nonces."""
    made = restless(session, tmp_path)
    client = made.clients[0]
    before = client.state
    client.share(1, made.vectors[0])
    client.state = before
    with pytest.raises(ProtocolError, match="answered from this state before"):
        client.share(1, made.vectors[1])
    with pytest.raises(ProtocolError, match="before"):
        Once(tmp_path / "once").take(before)


def test_what_a_client_refuses_it_refuses_after_it_was_resumed(session):
    made = restless(session)
    made.round(1)
    with pytest.raises(ProtocolError, match="round 1 does not come after round 1"):
        made.clients[0].share(1, made.vectors[0])
    proposal = made.run_to(m.Proposal, 2)[0]
    assert made.clients[0].receive(proposal) is not None
    with pytest.raises(ProtocolError, match="Quorum of round 2 is due"):
        made.clients[0].receive(proposal)
