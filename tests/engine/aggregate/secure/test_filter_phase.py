"""Hashes are fixed before they are told; all come to one verdict; nobody gains by what it sees of others."""

from dataclasses import replace

import pytest
import torch

from anabranch.aggregate.secure import local
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.filter_phase import ClientFilter, beacon_of, commitment_of, weights_of
from anabranch.aggregate.secure.filtration import Filtration, Hash, encode, hash_logits, judge
from anabranch.aggregate.secure.wire import read
from anabranch.federated import attacks
from anabranch_kernels.field_coding.op import FixedPoint

SMALL = Filtration(classes=4, bits=30, kappa=15.0, followers=0.0)


def hash_of(i, beacon, *, settings=SMALL):
    """Logits of nine clients that agree, but the last, which says the opposite."""
    common = torch.randn(40, 4, generator=torch.Generator().manual_seed(99)) * 3
    own = 0.6 * (i + 3) * torch.randn(40, 4, generator=torch.Generator().manual_seed(i))
    z = -common if i == 8 else common + own
    return hash_logits(z, beacon, settings, common.argmax(1))


def hashes(clients, settings=SMALL):
    return {i: hash_of(i, one.beacon, settings=settings) for i, one in clients.items()}


def kind(made, message):
    return type(made.message(message))


def run_to(made, kind_, number=1, settings=SMALL):
    """The phase up to the server's messages of this kind, which are not delivered."""
    server, clients = made.filters(settings, number)
    answers = {i: one.commit(hash) for (i, one), hash in zip(clients.items(), hashes(clients).values(), strict=True)}
    while True:
        for answer in answers.values():
            server.receive(answer)
        outgoing = server.advance()
        if all(kind(made, one) is kind_ for one in outgoing.values()):
            return server, clients, outgoing
        answers = {i: clients[i].receive(one) for i, one in outgoing.items()}


def changed(made, i, message, change):
    """A client's message with other content, signed by it."""
    from anabranch.aggregate.secure.wire import write

    header = read(message, made.parameters).header
    return write(
        change(header.message), (), parameters=made.parameters, identity=made.identities[i], number=header.number,
        sender=i, recipient=made.parameters.clients,
    ).encode()  # fmt: skip


def test_all_come_to_the_same_verdict_which_the_round_keeps(session):
    made = session(weights=(40,) * 9)
    settings = replace(SMALL, most_weight=40)
    filters = made.filters(settings)
    told = hashes(filters[1], settings)
    local.run_filter(*filters, told)
    verdict = judge(list(told.values()), settings)
    assert verdict.weights[8] == 0 < verdict.weights[:8].min() < 40
    for one in (filters[0], *filters[1].values()):
        assert one.outcome.weights == tuple(verdict.weights.tolist())
        assert one.outcome.reasons == ((8, "its logits are unlike the others'"),)
    local.run_round(made.server, made.clients, 1, made.vectors, filters=filters)
    outcome = made.server.outcome
    assert outcome.accepted == tuple(range(8))
    assert outcome.weights == filters[0].outcome.weights[:8]
    assert outcome.excluded == ((8, "filtered out"),)
    total = sum(w * (made.vectors[i].double() * 2**16).round() for i, w in zip(range(8), outcome.weights, strict=True))
    assert torch.equal(outcome.mean(made.parameters), total / (sum(outcome.weights) * 2**16))
    assert len(made.finished()) == 9


def test_weights_of_the_parameters_are_lowered_by_the_verdict(session):
    made = session(weights=tuple(range(1, 10)))
    settings = replace(SMALL, most_weight=3)
    told = {i: hash_of(i, b"", settings=settings) for i in range(9)}
    verdict = judge(list(told.values()), settings).weights.tolist()
    found = weights_of({i: encode(hash) for i, hash in told.items()}, made.parameters, settings)
    assert found.weights == tuple(max(1, (i + 1) * v // 3) if v else 0 for i, v in enumerate(verdict))
    assert max(found.weights) >= 4


def test_the_beacon_is_of_session_keys_round_and_settings(session):
    made, other = session(), session(session=bytes(32))
    roster = made.server.roster
    fewer = m.Roster(roster.members[1:], roster.publics[1:], roster.signatures[1:])
    seen = {
        beacon_of(made.parameters, 1, roster, SMALL), beacon_of(made.parameters, 2, roster, SMALL),
        beacon_of(other.parameters, 1, roster, SMALL), beacon_of(made.parameters, 1, fewer, SMALL),
        beacon_of(made.parameters, 1, roster, replace(SMALL, bits=31)),
    }  # fmt: skip
    assert len(seen) == 5
    assert {one.beacon for one in made.filters(SMALL)[1].values()} == {beacon_of(made.parameters, 1, roster, SMALL)}


def with_liar(made, liar, forged, settings=SMALL):
    """A phase in which one client sends, instead of its own, what `forged` makes of client 0's message and its own."""
    server, clients = made.filters(settings)
    answers = {i: one.commit(hash) for (i, one), hash in zip(clients.items(), hashes(clients).values(), strict=True)}
    own = made.message(answers[liar])
    while server.outcome is None:
        answers[liar] = changed(made, liar, answers[0], lambda message: forged(message, own))
        for answer in answers.values():
            server.receive(answer)
        answers = {i: clients[i].receive(one) for i, one in server.advance().items() if i != liar}
    assert all(one.outcome == server.outcome for i, one in clients.items() if i != liar)
    return server


@pytest.mark.parametrize("both", [False, True])
def test_a_hash_that_was_copied_is_no_good(both, session):
    """Client 8 sends what client 0 reveals: after a commitment of its own, or after a copy of client 0's."""
    copy = lambda message, own: own if isinstance(message, m.Commit) and not both else message
    server = with_liar(session(), 8, copy)
    assert server.outcome.weights == (1,) * 8 + (0,)
    assert server.outcome.reasons == ((8, "revealed another hash than it committed to"),)


def swapped(message):
    """Client 8 is said to have revealed client 0's hash."""
    bits = (*message.bits[:-1], message.bits[0])
    return m.Reveals(message.members, message.commits, message.nonces, bits, message.signatures)


@pytest.mark.parametrize(
    ("silent", "weights", "reason"),
    [(m.Commit, (0,) + (1,) * 7 + (0,), "did not commit to a hash"),
     (m.Reveal, (0,) + (1,) * 7 + (0,), "did not reveal its hash")],
)  # fmt: skip
def test_a_client_that_says_nothing_is_left_out(silent, weights, reason, session):
    made = session()
    wire = lambda client, to_server, data: None if client == 0 and to_server and kind(made, data) is silent else data
    filters = made.filters(SMALL)
    local.run_filter(*filters, hashes(filters[1]), wire)
    assert filters[0].outcome.weights == weights
    assert filters[0].outcome.reasons[0] == (0, reason)
    assert filters[1][0].outcome is None
    local.run_round(made.server, made.clients, 1, made.vectors, filters=filters)  # without client 0, one of D
    made.check(made.server.outcome)
    assert made.server.outcome.accepted == tuple(range(1, 8))


def test_what_is_no_hash_is_left_out(session):
    made, nonce, junk = session(), bytes(32), b"\xff" * 3
    beacon = made.filters(SMALL)[0].beacon

    def forged(message, own):
        if isinstance(message, m.Commit):
            return m.Commit(commitment_of(beacon, 3, nonce, junk))
        return m.Reveal(message.commits, nonce, junk)

    server = with_liar(made, 3, forged)
    assert server.outcome.weights == (1, 1, 1, 0, 1, 1, 1, 1, 0)
    assert server.outcome.reasons[0] == (3, "revealed no hash: a hash of 4 times 30 bits takes 16 bytes, got 3")


def test_a_client_notices_that_another_spoke_for_it(session):
    made = session()
    server, clients = made.filters(SMALL)
    for i, hash in hashes(clients).items():
        answer = clients[i].commit(hash)
        server.receive(changed(made, 3, answer, lambda own: m.Commit(bytes(32))) if i == 3 else answer)
    commits = server.advance()
    with pytest.raises(ProtocolError, match="another commitment of this client"):
        clients[3].receive(commits[3])


def test_messages_of_another_round_or_step_are_refused(session):
    made = session()
    server, clients, commits = run_to(made, m.Commits, 1)
    later, later_clients = made.filters(SMALL, 2)
    told = hashes(later_clients)
    first = later_clients[0].commit(told[0])
    with pytest.raises(ProtocolError, match="committed to a hash before"):
        later_clients[0].commit(told[1])
    with pytest.raises(ProtocolError, match="Commits of round 1, which is not due"):
        later_clients[0].receive(commits[0])
    with pytest.raises(ProtocolError, match="Commits of round 2, which is not due"):
        clients[0].receive(made.forge(run_to(made, m.Commits, 2)[2][0], lambda message, parts: message))
    reveal = clients[0].receive(commits[0])
    with pytest.raises(ProtocolError, match="Reveal of round 1, which is not due"):
        later.receive(reveal)
    with pytest.raises(ProtocolError, match="Commits of round 1, which is not due"):
        clients[0].receive(commits[0])  # a second time
    later.receive(first)
    with pytest.raises(ProtocolError, match="Commit twice"):
        later.receive(first)
    with pytest.raises(ProtocolError, match="has 1 commitments or reveals; 3 are needed"):
        later.advance()
    server.receive(reveal)
    with pytest.raises(ProtocolError, match="Reveal twice"):
        server.receive(reveal)
    with pytest.raises(ProtocolError, match="Hello of round 0, which is not due"):
        server.receive(made.clients[0].hello())
    with pytest.raises(ProtocolError, match="which is not due"):  # of a client that has committed to nothing
        ClientFilter(made.parameters, 1, made.identities[1], 1, made.server.roster, SMALL).receive(commits[1])


def test_a_reveal_without_a_commitment_is_refused(session):
    made = session()
    server, clients = made.filters(SMALL)
    told = hashes(clients)
    for i in range(4):
        server.receive(clients[i].commit(told[i]))
    commits = server.advance()
    clients[5].commit(told[5])
    with pytest.raises(ProtocolError, match="leaves out this client's commitment"):
        clients[5].receive(commits[0])
    reveal = clients[0].receive(commits[0])
    with pytest.raises(ProtocolError, match="without a commitment"):
        server.receive(changed(made, 5, reveal, lambda own: own))


def test_a_server_cannot_put_words_into_mouths(session):
    made = session()
    _, clients, commits = run_to(made, m.Commits)
    other = lambda message, parts: m.Commits(
        message.members, (message.commitments[1], *message.commitments[1:]), message.signatures
    )
    with pytest.raises(ProtocolError, match="commitment of client 0 is not signed"):
        clients[4].receive(made.forge(commits[4], other))
    _, clients, reveals = run_to(made, m.Reveals)
    for i in (8, 4):
        with pytest.raises(ProtocolError, match="reveal of client 8 is not signed"):
            clients[i].receive(made.forge(reveals[i], lambda message, parts: swapped(message)))
        assert clients[i].outcome is None


def test_a_server_that_shows_different_commitments_is_noticed(session):
    """Client 0 is shown fewer commitments than the others: its reveal does not count for them, nor theirs for it."""
    made = session()
    server, clients, commits = run_to(made, m.Commits)
    less = lambda message, parts: m.Commits(message.members[:-1], message.commitments[:-1], message.signatures[:-1])
    answers = [clients[0].receive(made.forge(commits[0], less))]
    answers += [clients[i].receive(commits[i]) for i in range(1, 9)]
    for answer in answers:
        server.receive(answer)
    reveals = server.advance()
    with pytest.raises(ProtocolError, match="1 clients revealed their hashes"):
        clients[0].receive(reveals[0])
    for i in range(1, 9):
        clients[i].receive(reveals[i])
        assert clients[i].outcome.reasons[0] == (0, "revealed its hash for other commitments")


def test_different_verdicts_find_no_quorum(session):
    """Half of the clients are not shown one reveal; what they sign is another set of weights."""
    made = session(weights=(40,) * 9)
    settings = replace(SMALL, most_weight=40)
    server, clients, reveals = run_to(made, m.Reveals, settings=settings)
    less = lambda message, parts: m.Reveals(
        message.members[1:], message.commits[1:], message.nonces[1:], message.bits[1:], message.signatures[1:]
    )
    for i, message in reveals.items():
        clients[i].receive(made.forge(message, less) if i % 2 else message)
    assert len({one.outcome.weights for one in clients.values()}) == 2
    with pytest.raises(ProtocolError, match=r"was filtered out|other set|signatures; "):
        local.run_round(made.server, made.clients, 1, made.vectors, filters=(server, clients))
    assert not made.finished()


def test_hashes_that_are_too_long_are_named(session):
    made = session()
    with pytest.raises(ValueError, match="a hash of 100 times 80 bits has 1013 bytes; 1000 fit"):
        made.filters(Filtration(classes=100, bits=80))
    _, clients = made.filters(SMALL)
    with pytest.raises(ValueError, match="takes 16 bytes"):
        clients[0].commit(Hash(torch.ones(4, 9, dtype=torch.bool), torch.ones(4, dtype=torch.bool)))


@pytest.fixture(scope="module")
def fleet(trained_alone):
    """Logits [12, 200, 10] of clients trained alone on digits, and the public labels [200]."""
    z, y = trained_alone(12, skew=0.0, seed=0)
    return z[:, :200], y[:200]


ATTACKS = {
    "none": lambda z: z,
    "FDLA": attacks.logits_reordered,
    "PCFDLA": lambda z: attacks.logits_peaked(z, peak=0.9),
    "sign flip": torch.neg,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_distillation_by_secure_sums(attack, fleet, session):
    """Accuracy with secure sums is that without; the filter keeps it under attack by five of twelve clients."""
    z, y = fleet
    z = torch.cat([ATTACKS[attack](z[:5]), z[5:]])
    probabilities = z.softmax(2).flatten(1)
    made = session(
        N=12, length=2000, blocks=2, dropouts=3, proof="V1", fixed_point=FixedPoint(clip=1.0, fraction_bits=20)
    )
    made.vectors = dict(enumerate(probabilities))
    settings = Filtration(classes=10)
    filters = made.filters(settings)
    told = {i: hash_logits(z[i], one.beacon, settings, y) for i, one in filters[1].items()}
    local.run_filter(*filters, told)
    accuracy = {}
    for number, used in ((1, None), (2, filters)):
        local.run_round(made.server, made.clients, number, made.vectors, filters=used)
        outcome = made.server.outcome
        secure = outcome.mean(made.parameters)
        plain = probabilities[list(outcome.accepted)].double().mean(0)
        assert (secure - plain).abs().max() <= 2**-21
        named = [mean.view(200, 10).argmax(1) for mean in (secure, plain)]
        assert named[0].equal(named[1])
        accuracy[used is not None] = (named[0] == y).double().mean().item()
    accepted = set(made.server.outcome.accepted)
    if attack == "none":
        assert len(accepted) >= 10
        assert accuracy[True] > 0.9
    else:
        assert not accepted & set(range(5))
        assert len(accepted) >= 5
        assert accuracy[True] > 0.9
        assert accuracy[True] >= accuracy[False]
