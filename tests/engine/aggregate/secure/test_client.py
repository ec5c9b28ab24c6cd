"""What a client refuses: a server that lies, replays, mixes up or shows different things to different clients."""

from dataclasses import replace

import pytest
import torch

from anabranch.aggregate.secure import client as client_module
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure import server as server_module
from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.wire import Header, digests_of, read, write
from anabranch_kernels.field_coding.op import BABYBEAR


def refuses(client, data, match):
    with pytest.raises(ProtocolError, match=match) as caught:
        client.receive(data)
    assert client.outcome is None
    return caught.value


def finish(made, outgoing):
    """The round goes on from these messages of the server and ends well."""
    while made.server.outcome is None:
        for i, one in outgoing.items():
            if (answer := made.clients[i].receive(one)) is not None:
                made.server.receive(answer)
        outgoing = made.server.advance()
    for i, one in outgoing.items():
        made.clients[i].receive(one)
    made.check(made.server.outcome)
    assert len(made.finished()) == len(made.clients)


class Believing(Server):
    """Does not look at what it sends."""

    def _conclude(self, view, claim, proof, frame):
        self._finish(view, claim)


@pytest.fixture
def wrong_by_one(monkeypatch):
    """A server that adds one to one element of the sum."""
    honest = server_module.decode

    def decode(shares, clients, code):
        blocks = honest(shares, clients, code)
        blocks[1, 2] = (int(blocks[1, 2]) + 1) % code.field.p
        return blocks

    monkeypatch.setattr(server_module, "decode", decode)


@pytest.mark.usefixtures("wrong_by_one")
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_a_sum_wrong_by_one_is_refused_by_projections(session, mode):
    made = session(mode=mode, server_kind=Believing)
    for i, proof in made.run_to(m.Proof).items():
        error = refuses(made.clients[i], proof, "its sum is wrong")
        assert error.who == "server"


@pytest.mark.usefixtures("wrong_by_one")
def test_an_honest_server_notices_before_it_sends(session):
    made = session()
    with pytest.raises(ProtocolError, match="its sum is wrong"):
        made.round()


@pytest.mark.usefixtures("wrong_by_one")
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_a_sum_wrong_by_one_is_refused_by_tags(session, mode):
    made = session(mode=mode, proof="V1")
    for i, result in made.run_to(m.Result).items():
        refuses(made.clients[i], result, "the tag of its sum is wrong")


@pytest.mark.usefixtures("wrong_by_one")
def test_without_a_proof_it_is_not(session):
    """The test above has power: nothing else notices."""
    made = session(proof="V0")
    outcome = made.round()
    assert outcome.sum.tolist() != made.expected(outcome.accepted)


def test_without_a_proof_clients_see_that_others_signed_their_sums(session):
    made = session(proof="V0")
    results = made.run_to(m.Result)

    def other_sum(result, parts):
        return replace(result, sums=(bytes(32), *result.sums[1:]))

    refuses(made.clients[4], made.forge(results[4], other_sum), "client 0 did not sign the sum shown")


@pytest.mark.parametrize("at", [0, 4])
def test_two_sums_for_one_proof(session, at):
    """Projections made for one result prove no other."""
    made = session()
    results = made.run_to(m.Result)

    def changed(result, parts):
        parts[0] = parts[0][: 4 * at] + bytes([parts[0][4 * at] ^ 1]) + parts[0][4 * at + 1 :]
        return result

    victim = 3
    answers = [c.receive(results[i]) for i, c in made.clients.items() if i != victim]
    projection = made.clients[victim].receive(made.forge(results[victim], changed))
    for answer in answers:
        made.server.receive(answer)
    with pytest.raises(ProtocolError, match="client 3: projects for another result"):
        made.server.receive(projection)
    refuses(made.clients[victim], made.server.advance()[0], "did not sign the projection shown")


def test_clients_that_see_different_sets_agree_to_none(session):
    """Showing A to some and A without client 8 to others would give client 8's vector by a subtraction."""
    made = session()
    proposals = made.run_to(m.Proposal)

    def without_8(proposal, parts):
        return replace(proposal, accepted=proposal.accepted[:-1], commitments=proposal.commitments[:-1])

    other = {i: made.forge(proposals[i], without_8) for i in range(5)}
    answers = {i: made.clients[i].receive(other.get(i, proposals[i])) for i in range(9)}
    for i in range(5):
        with pytest.raises(ProtocolError, match=f"client {i}: speaks of another set"):
            made.server.receive(answers[i])
    signatures = tuple(read(answer, made.parameters).signature for answer in answers.values())
    for i, client in made.clients.items():
        message = m.Quorum(tuple(range(9)), signatures)
        quorum = write(
            message, (), parameters=made.parameters, identity=made.identities[-1], number=1, sender=9, recipient=i
        ).encode()
        refuses(client, quorum, r"client \d did not agree to the set shown here")


def test_a_set_is_signed_once(session):
    made = session()
    proposals = made.run_to(m.Proposal)
    assert made.clients[0].receive(proposals[0]) is not None
    refuses(made.clients[0], proposals[0], "sent Proposal of round 1; Quorum of round 1 is due")


@pytest.mark.parametrize("kind", [m.Delivery, m.Proposal, m.Quorum, m.Result, m.Proof], ids=lambda kind: kind.__name__)
def test_messages_of_an_earlier_round_are_refused(session, kind):
    made = session()
    old = made.run_to(kind, 1)
    new = made.run_to(kind, 2)
    for i, client in made.clients.items():
        refuses(client, old[i], f"sent {kind.__name__} of round 1; {kind.__name__} of round 2 is due")
    finish(made, new) if kind is not m.Proof else [made.clients[i].receive(one) for i, one in new.items()]
    made.check(made.server.outcome)


def test_a_message_to_somebody_else_is_refused(session):
    made = session()
    deliveries = made.run_to(m.Delivery)
    refuses(made.clients[0], deliveries[1], "a message from server to client 1, not for here")
    finish(made, deliveries)


NOT_FOR_HERE = "the share was not sealed for this client and round, or not with this header"


def refusals(made, i, delivery):
    """What client i says about the shares it does not take."""
    return dict(made.message(made.clients[i].receive(delivery)).refused)


def test_shares_swapped_between_owners(session):
    made = session()
    deliveries = made.run_to(m.Delivery)

    def swapped(delivery, parts):
        parts[0], parts[1] = parts[1], parts[0]
        return delivery

    found = refusals(made, 0, made.forge(deliveries[0], swapped))
    assert found == dict.fromkeys((1, 2), NOT_FOR_HERE)


def test_shares_swapped_between_recipients(session):
    made = session()
    deliveries = made.run_to(m.Delivery)
    to_1 = read(deliveries[1], made.parameters).parts

    def swapped(delivery, parts):
        parts[1] = bytes(to_1[1])  # from owner 2, for client 1
        return delivery

    found = refusals(made, 0, made.forge(deliveries[0], swapped))
    assert found == {2: NOT_FOR_HERE}


def test_shares_of_an_earlier_round(session):
    made = session()
    old = made.run_to(m.Delivery, 1)[0]
    new = made.run_to(m.Delivery, 2)[0]

    def replayed(delivery, parts):
        earlier = made.message(old)
        parts[:] = [bytes(part) for part in read(old, made.parameters).parts]
        return earlier

    found = refusals(made, 0, made.forge(new, replayed))
    assert found == dict.fromkeys(range(1, 9), "a header of another round or client")


def test_a_share_to_oneself(session):
    """Its refusal would wipe out the share that a client has from itself."""
    made = session()
    deliveries = made.run_to(m.Delivery)
    of_0 = made.message(deliveries[1]).headers[0]

    def to_itself(delivery, parts):
        parts.append(bytes(len(parts[0])))
        return replace(delivery, owners=(0, *delivery.owners), headers=(of_0, *delivery.headers))

    refuses(made.clients[0], made.forge(deliveries[0], to_itself), "delivers a share of client 0 to itself")
    finish(made, deliveries)


@pytest.mark.parametrize("item", [0, 3])
def test_headers_that_are_not_their_owner_s(session, item):
    """Or a server could have an honest owner's shares projected by what it likes, by each client by something else."""
    made = session()
    delivery = made.run_to(m.Delivery)[0]

    def changed(delivery, parts):
        header = Header.decode(delivery.headers[0], made.parameters)
        digests = [bytes(32) if k == item else digest for k, digest in enumerate(header.digests)]  # its own, another's
        header = replace(header, digests=tuple(digests)).encode(made.parameters)
        return replace(delivery, headers=(header, *delivery.headers[1:]))

    assert refusals(made, 0, made.forge(delivery, changed)) == {1: NOT_FOR_HERE}


class SealsForAnother(Client):
    """Seals client 0's share with client 2's key, and commits to that."""

    def _seal(self, number, shares, masked, blocks):
        honest = self._peers[0]
        self._peers[0] = self._peers[2]
        try:
            return super()._seal(number, shares, masked, blocks)
        finally:
            self._peers[0] = honest


class CommitsToAnother(Client):
    """Seals another share for client 0 than it committed to."""

    def _seal(self, number, shares, masked, blocks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_module, "digests_of", self._digests)
            return super()._seal(number, shares, masked, blocks)

    def _digests(self, parts):
        digests = digests_of(parts)
        return [bytes(32), *digests[1:]] if digests else []


class NotCanonical(Client):
    """Sends elements that are p too large."""

    def _code(self, blocks):
        shares, masked = super()._code(blocks)
        shares[0] = torch.full_like(shares[0], BABYBEAR.p)
        return shares, masked


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SealsForAnother, "was not sealed for this client and round"),
        (CommitsToAnother, "not the one it committed to"),
        (NotCanonical, "elements that are not canonical"),
    ],
)
def test_an_owner_that_cheats_one_client_is_in_a_dispute_with_it(session, kind, reason):
    made = session(kinds={1: kind})
    delivery = made.run_to(m.Delivery)[0]
    assert reason in refusals(made, 0, delivery)[1]
    made = session(kinds={1: kind})
    outcome = made.round()
    made.check(outcome)
    assert outcome.wrong == (0,)  # nobody can tell who of the two is to blame; client 0 has no share to add
    assert outcome.accepted == tuple(range(9))


def test_a_roster_with_a_key_of_the_servers_own(session):
    made = session(met=False)
    for client in made.clients.values():
        made.server.receive(client.hello())
    rosters = made.server.advance()

    def in_the_middle(roster, parts):
        return replace(roster, publics=(bytes(range(32)), *roster.publics[1:]))

    refuses(
        made.clients[1], made.forge(rosters[1], in_the_middle), "session key of client 0 is not signed by that client"
    )
    made.clients[1].receive(rosters[1])


def test_a_session_key_of_low_order_is_refused(session):
    class LowOrder(Client):
        def hello(self):
            return self._write(m.Hello(bytes(32)), (), 0).encode()

    made = session(met=False, kinds={2: LowOrder})
    for client in made.clients.values():
        made.server.receive(client.hello())
    error = refuses(made.clients[0], made.server.advance()[0], "low order")
    assert error.who == "client 2"


def proposals_that_lie():
    yield "T \\+ 2 = 4 are needed", lambda one: replace(one, accepted=one.accepted[:3], commitments=one.commitments[:3])
    yield "E = 1 are allowed", lambda one: replace(one, suspects=(1, 2))
    yield "different Shares of client 0", lambda one: replace(one, commitments=(bytes(32), *one.commitments[1:]))


@pytest.mark.parametrize(("match", "change"), list(proposals_that_lie()))
def test_sets_that_would_tell_too_much(session, match, change):
    made = session()
    proposals = made.run_to(m.Proposal)
    refuses(made.clients[5], made.forge(proposals[5], lambda one, parts: change(one)), match)
    finish(made, proposals)


def test_too_few_signatures(session):
    made = session()
    quorums = made.run_to(m.Quorum)
    needed = made.parameters.quorum
    fewer = made.forge(quorums[0], lambda one, parts: m.Quorum(one.signers[: needed - 1], one.signatures[: needed - 1]))
    refuses(made.clients[0], fewer, f"{needed - 1} clients agreed; {needed} are needed")
    finish(made, quorums)


def results_that_lie():
    yield "of another set", lambda one: replace(one, view=bytes(32))
    yield "did not use the sum that client 0 sent", lambda one: replace(one, sums=(bytes(32), *one.sums[1:]))
    yield "too many to be sure", lambda one: replace(one, wrong=(1, 2))
    yield (
        "5 answers; K \\+ T \\+ E = 6 are needed",
        lambda one: replace(one, members=one.members[:5], sums=one.sums[:5], signatures=one.signatures[:5]),
    )


@pytest.mark.parametrize(("match", "change"), list(results_that_lie()))
def test_results_that_do_not_fit(session, match, change):
    made = session()
    results = made.run_to(m.Result)
    refuses(made.clients[0], made.forge(results[0], lambda one, parts: change(one)), match)
    finish(made, results)


def proofs_that_lie():
    def fewer(one, parts):
        parts[0] = parts[0][: 5 * 16]
        return replace(one, members=one.members[:5], signatures=one.signatures[:5], masked=one.masked[:5])

    def other_letters(one, parts):
        parts[0] = bytes([parts[0][0] ^ 1]) + parts[0][1:]
        return one

    def more_wrong(one, parts):
        return replace(one, wrong=(3, 4))

    yield "K \\+ T \\+ E = 6 are needed", "direct", fewer
    yield "client 0 did not sign the projection", "direct", other_letters
    yield "too many to be sure", "direct", more_wrong

    def without_an_owner(one, parts):
        parts[1] = parts[1][:-48]
        return replace(one, masked=one.masked[:-1])

    def another_vector(one, parts):
        parts[1] = parts[1][:-48]
        parts.append(bytes(3 * 5 * 4))
        return replace(one, masked=one.masked[:-1], late=one.masked[-1:])

    yield "did not sign the projection", "mask", without_an_owner
    yield "did not sign the projection", "mask", another_vector


@pytest.mark.parametrize(("match", "mode", "change"), list(proofs_that_lie()))
def test_proofs_that_do_not_fit(session, match, mode, change):
    made = session(mode=mode)
    proofs = made.run_to(m.Proof)
    refuses(made.clients[0], made.forge(proofs[0], change), match)
    for i, proof in proofs.items():
        made.clients[i].receive(proof)
    made.check(made.server.outcome)


@pytest.mark.parametrize("lie", ["other vector", "nothing"])
def test_masked_vectors_of_silent_owners_are_those_they_committed_to(session, lie):
    made = session(mode="mask")
    results = made.run_to(m.Result)
    for i in range(1, 9):
        made.server.receive(made.clients[i].receive(results[i]))
    made.clients[0].receive(results[0])
    proofs = made.server.advance()
    assert made.message(proofs[1]).late == (0,)

    def change(one, parts):
        if lie == "nothing":
            del parts[2]
            return replace(one, late=())
        parts[2] = bytes(len(parts[2]))
        return one

    match = "does not speak of the masked vectors" if lie == "nothing" else "not the one of client 0"
    refuses(made.clients[1], made.forge(proofs[1], change), match)
    for i, proof in proofs.items():
        made.clients[i].receive(proof)
    made.check(made.server.outcome)


def test_rounds_count_upwards(session):
    made = session()
    made.clients[0].share(3, made.vectors[0])
    for number in (3, 2, 0):
        with pytest.raises(ProtocolError, match=f"round {number} does not come after round 3"):
            made.clients[0].share(number, made.vectors[0])
    made.clients[0].share(4, made.vectors[0])


def test_vectors_that_are_no_vectors(session):
    client = session().clients[0]
    with pytest.raises(ValueError, match=r"vector must be \[13\], got \[12\]"):
        client.share(1, torch.zeros(12))
    with pytest.raises(ValueError, match="not finite"):
        client.share(1, torch.full((13,), float("nan")))
    client.share(1, torch.zeros(13))  # neither has used up the round


def test_a_client_that_is_not_in_the_parameters(session):
    made = session(proof="V1")
    with pytest.raises(ValueError, match="another client 1"):
        Client(made.parameters, 1, made.identities[0])
    with pytest.raises(ValueError, match="group_key of 32 bytes is needed for proof V1"):
        Client(made.parameters, 0, made.identities[0])


def test_it_shares_nothing_before_it_has_met_the_others(session):
    with pytest.raises(ProtocolError, match="has no session keys yet"):
        session(met=False).clients[0].share(1, torch.zeros(13))
