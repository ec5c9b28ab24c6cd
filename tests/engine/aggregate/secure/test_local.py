"""Whole rounds: the sum is that of the integers, whoever falls silent; who lies is named; too many liars end it."""

import pytest
import torch

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.wire import read
from anabranch_kernels.field_coding.op import FIELDS, FixedPoint, multiply

STEPS = (m.Shares, m.Check, m.Agreement, m.Sum, m.Projection)


def silent(session, clients, step):
    """A wire on which these clients send nothing from a step on."""
    late = STEPS[STEPS.index(step) :]

    def wire(client, to_server, message):
        if client in clients and to_server and isinstance(read(message, session.parameters).header.message, late):
            return None
        return message

    return wire


def spoilt(rows, how, modulus):
    """Wrong elements: the lowest bit of one, one, or all."""
    rows = rows.clone()
    if how == "bit":
        rows[..., 1] = torch.where(rows[..., 1] == modulus - 1, 0, rows[..., 1] ^ 1)
    else:
        chosen = slice(2, 3) if how == "element" else slice(None)
        rows[..., chosen] = (rows[..., chosen] + 12345) % modulus
    return rows


def wrong_sum(how):
    class WrongSum(Client):
        """Answers the owners' check like everybody, then adds up other shares."""

        def _sum(self, now, quorum):
            self._rows[now.view.accepted[0]] = spoilt(self._rows[now.view.accepted[0]], how, self._parameters.field.p)
            return super()._sum(now, quorum)

    return WrongSum


class WrongLetters(Client):
    """Contradicts every owner."""

    def _check(self, now, delivery, frame):
        done = super()._check(now, delivery, frame)
        letters = spoilt(
            torch.frombuffer(bytearray(read(done, self._parameters).parts[0]), dtype=torch.int32), "all", 7
        )
        part = letters.numpy().tobytes()
        return self._write(read(done, self._parameters).header.message, (part,), now.number).encode()


class HighDegree(Client):
    """Shares values of a polynomial of degree K + T."""

    def _code(self, blocks):
        shares, masked = super()._code(blocks)
        code, p = self._parameters.code, self._parameters.field.p
        power = torch.tensor([[pow(a, code.threshold, p)] for a in code.alpha], dtype=shares.dtype)
        row = torch.full((1, shares.shape[1]), 77, dtype=shares.dtype)
        both = torch.stack([shares.view(-1), multiply(power, row, code.field).view(-1)])
        return multiply(torch.ones(1, 2, dtype=shares.dtype), both, code.field).view(shares.shape), masked


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_the_sum_is_that_of_the_integers(session, field, mode):
    made = session(field=FIELDS[field], mode=mode, weights=(3, 1, 4, 1, 5, 9, 2, 6, 5))
    outcome = made.round()
    made.check(outcome)
    assert outcome.accepted == tuple(range(9))
    assert (outcome.excluded, outcome.wrong, outcome.clipped) == ((), (), None)
    assert (outcome.mode, outcome.proof) == (mode, "V2")
    assert len(made.finished()) == 9
    made.check(made.round(2))  # the same keys serve another round


@pytest.mark.parametrize("proof", ["V0", "V1"])
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_so_it_is_with_weaker_proofs(session, proof, mode):
    made = session(proof=proof, mode=mode)
    outcome = made.round()
    made.check(outcome)
    assert outcome.proof == made.clients[0].outcome.proof == proof


@pytest.mark.parametrize(
    ("N", "K", "T", "E", "D", "length"),
    [(3, 1, 1, 0, 0, 1), (5, 1, 1, 1, 0, 7), (8, 4, 2, 0, 1, 5), (17, 8, 3, 2, 2, 31)],
)
def test_sizes(session, N, K, T, E, D, length):
    made = session(N=N, length=length, blocks=K, privacy=T, errors=E, dropouts=D)
    made.check(made.round())


def test_saturating_inputs_with_all_the_weight_there_is(session):
    """Two to the twentieth times 960 is the most that BabyBear holds."""
    weights = (952, 1, 1, 1, 1, 1, 1, 1, 1)
    made = session(weights=weights, fixed_point=FixedPoint(clip=1.0, fraction_bits=20))
    for sign in (1.0, -1.0):
        made.vectors = {i: torch.full((13,), sign) for i in range(9)}
        outcome = made.round(1 if sign > 0 else 2)
        made.check(outcome)
        assert torch.equal(outcome.mean(made.parameters), torch.full((13,), sign, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most a weight of 960"):
        session(weights=(953, *weights[1:]), fixed_point=FixedPoint(clip=1.0, fraction_bits=20))


def test_clipped_numbers_are_counted_by_their_owner_alone(session):
    made = session()
    made.vectors[4][:3] = torch.tensor([5.0, -2.0, 1.0])
    outcome = made.round()
    assert made.clients[4].outcome.clipped == 2
    assert made.clients[5].outcome.clipped == 0
    made.vectors[4][:2] = torch.tensor([1.0, -1.0])
    made.check(outcome)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_any_d_clients_may_fall_silent_at_any_step(session, step, mode):
    made = session(mode=mode)
    outcome = made.round(wire=silent(made, {1, 6}, step))
    made.check(outcome)
    gone = {1, 6} if step is m.Shares else set()
    assert set(outcome.accepted) == set(range(9)) - gone
    assert [client for client, _ in outcome.excluded] == sorted(gone)
    assert set(made.finished()) >= set(range(9)) - {1, 6}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_too_many_silent_clients_end_the_round(session, step):
    made = session(N=8, blocks=3, privacy=2, errors=1, dropouts=1)
    with pytest.raises(ProtocolError, match="needed"):
        made.round(wire=silent(made, {0, 1, 2, 3, 4}, step))
    assert made.server.outcome is None
    assert made.finished() == {}


@pytest.mark.parametrize("how", ["bit", "element", "all"])
@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_clients_with_wrong_sums_are_named(session, how, mode):
    made = session(N=13, errors=2, dropouts=1, mode=mode, kinds={2: wrong_sum(how), 7: wrong_sum(how)})
    outcome = made.round()
    made.check(outcome)
    assert outcome.accepted == tuple(range(13))
    assert outcome.wrong == (2, 7)
    assert all(one.wrong == (2, 7) for one in made.finished().values())


@pytest.mark.parametrize("liars", [2, 3, 4])
def test_too_many_wrong_sums_end_the_round(session, liars):
    made = session(N=9, dropouts=0, kinds={i: wrong_sum("all") for i in range(liars)})
    with pytest.raises(ProtocolError, match=r"coded sums are wrong"):
        made.round()
    assert made.finished() == {}


def test_a_client_that_contradicts_every_owner_is_not_listened_to(session):
    made = session(kinds={5: WrongLetters})
    outcome = made.round()
    made.check(outcome)
    assert outcome.accepted == tuple(range(9))
    assert outcome.wrong == (5,)


@pytest.mark.parametrize("mode", ["direct", "mask"])
def test_an_owner_whose_shares_lie_on_no_polynomial_is_named(session, mode):
    made = session(mode=mode, kinds={3: HighDegree})
    outcome = made.round()
    made.check(outcome)
    assert outcome.excluded == ((3, "its shares do not lie on one polynomial"),)
    assert outcome.accepted == (0, 1, 2, 4, 5, 6, 7, 8)


def test_clients_whose_vectors_are_left_out_still_add_up_others(session):
    """Weights lowered for a round, zeros among them; once their own Checks spoke of vectors that were not shared."""
    made = session(weights=(5,) * 9)
    weights = (5, 0, 3, 1, 0, 5, 5, 2, 4)
    made.server.begin(1, weights=weights)
    answers = {i: one.share(1, made.vectors[i], weights=weights) for i, one in made.clients.items()}
    while made.server.outcome is None:
        for answer in answers.values():
            made.server.receive(answer)
        replies = {i: made.clients[i].receive(one) for i, one in made.server.advance().items()}
        answers = {i: reply for i, reply in replies.items() if reply is not None}
    outcome = made.server.outcome
    assert outcome.accepted == (0, 2, 3, 5, 6, 7, 8)
    assert outcome.excluded == ((1, "filtered out"), (4, "filtered out"))
    assert outcome.wrong == ()
    total = sum(w * (made.vectors[i].double() * 2**16).round() for i, w in enumerate(weights))
    assert torch.equal(outcome.mean(made.parameters), total / (sum(weights) * 2**16))
    assert len(made.finished()) == 9
