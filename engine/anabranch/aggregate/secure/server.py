"""The server: relays sealed shares, chooses whose vectors to sum, decodes the sum and gathers its proof.

    server = Server(parameters, identity)
    server.receive(message)              for each message of a client
    to_clients = server.advance()        when all have answered, or no more are waited for: {client: bytes}

`advance` says by a ProtocolError that too few answers are there; more may still come, and it can be called again. It is
called once for the Hellos and then, each round, for Shares, Check, Agreement, Sum and (V2) Projection.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure import verify
from anabranch.aggregate.secure.choose import choose_owners
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import Identity, Randomness
from anabranch.aggregate.secure.outcome import Outcome, View, check_view, correctable
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.proof import locate, project
from anabranch.aggregate.secure.wire import Frame, Part, name, receive, to_bytes, to_elements, write
from anabranch_kernels.field_coding.op import decode, matrix_of, multiply

Outgoing = dict[int, bytes]  # client -> message


@dataclass(kw_only=True)
class _Round:
    """What the server remembers of the round it is in."""

    number: int
    weights: tuple[int, ...]
    answers: dict[int, Frame] = field(default_factory=dict)  # of the step
    shares: dict[int, Frame] = field(default_factory=dict)
    excluded: dict[int, str] = field(default_factory=dict)
    view: View | None = None
    claim: verify.Claim | None = None


class Server:
    """The server of a session; see the module."""

    def __init__(
        self, parameters: Parameters, identity: Identity, *, randomness: Randomness = secrets.token_bytes
    ) -> None:
        if identity.public != parameters.server:
            raise ValueError("the parameters know another server")
        self.outcome: Outcome | None = None
        self.roster: m.Roster | None = None  # the session's keys, once they are known
        self._parameters = parameters
        self._identity = identity
        self._randomness = randomness
        self._round = _Round(number=0, weights=parameters.all_weights)
        self._expects: type[m.Message] | None = m.Hello

    def begin(self, number: int, *, weights: tuple[int, ...] | None = None) -> None:
        """Start a round, whatever became of the last one. `weights` as in Client.share."""
        if self._expects is m.Hello:
            raise ProtocolError("server", "has no session keys to start a round with")
        if number <= self._round.number:
            raise ProtocolError("server", f"round {number} does not come after round {self._round.number}")
        self._round = _Round(number=number, weights=weights or self._parameters.all_weights)
        self._expects, self.outcome = m.Shares, None

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Clients whose answer to this step is not there."""
        return tuple(i for i in range(self._parameters.clients) if self._expects and i not in self._round.answers)

    def receive(self, data: Part) -> None:
        """Take a client's message; a second one of the same step is refused."""
        p, now = self._parameters, self._round
        frame = receive(data, p, recipient=p.clients, senders=range(p.clients))
        who, message = name(frame.header.sender, p), frame.header.message
        if type(message) is not self._expects or frame.header.number != now.number:
            due = f"{self._expects.__name__} of round {now.number}" if self._expects else "nothing"
            raise ProtocolError(who, f"sent {type(message).__name__} of round {frame.header.number}; {due} is due")
        if frame.header.sender in now.answers:
            raise ProtocolError(who, f"sent {type(message).__name__} twice")
        self._check(frame)
        now.answers[frame.header.sender] = frame

    def _check(self, frame: Frame) -> None:
        """Raises ProtocolError for answers that can be seen to be wrong at once."""
        now, message, sender = self._round, frame.header.message, frame.header.sender
        who = name(sender, self._parameters)
        if isinstance(message, m.Shares) and not self._canonical(frame.parts[len(message.recipients) :]):
            raise ProtocolError(who, "its masked vector or its tag has elements that are not canonical")
        if isinstance(message, m.Check) and not set(message.owners) <= set(now.shares):
            raise ProtocolError(who, "speaks of vectors that were not shared")
        if isinstance(message, m.Agreement | m.Sum):
            assert now.view is not None
            if message.view != now.view.digest:
                raise ProtocolError(who, "speaks of another set of vectors")
            if isinstance(message, m.Sum) and sender in now.view.suspects:
                raise ProtocolError(who, "is a suspect: its sum does not count")
        if isinstance(message, m.Projection):
            assert now.claim is not None
            if message.result != now.claim.digest:
                raise ProtocolError(who, "projects for another result")
            assert now.view is not None
            if message.masked != (self._parameters.mode == "mask" and sender in now.view.accepted):
                raise ProtocolError(who, "projects masked vectors that it should not, or not those it should")

    def advance(self) -> Outgoing:
        """Close the step and make the next messages."""
        steps = {
            m.Hello: self._roster, m.Shares: self._deliver, m.Check: self._propose, m.Agreement: self._quorum,
            m.Sum: self._result, m.Projection: self._proof,
        }  # fmt: skip
        if self._expects is None:
            raise ProtocolError("server", "no round is under way")
        outgoing, self._expects = steps[self._expects](self._round.answers)
        self._round.answers = {}
        return outgoing

    def _roster(self, hellos: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p = self._parameters
        members = tuple(sorted(hellos))
        _need(members, p.clients - p.dropouts, "Hellos")
        publics = tuple(hello.public for i in members if isinstance(hello := hellos[i].header.message, m.Hello))
        self.roster = m.Roster(members, publics, tuple(hellos[i].signature for i in members))
        return self._to_all(self.roster, (), members), None

    def _deliver(self, shares: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        owners = {i: frame for i, frame in shares.items() if now.weights[i]}
        _need(owners, p.least_owners, "Shares")
        outgoing = {}
        for j in shares:
            parts, digests, chosen = [], [], []
            for i in sorted(owners):
                message = owners[i].header.message
                assert isinstance(message, m.Shares)
                if i != j and j in message.recipients:
                    k = message.recipients.index(j)
                    chosen.append(i)
                    parts.append(owners[i].parts[k])
                    digests.append(owners[i].header.digests[k])
            delivery = m.Delivery(
                tuple(chosen), tuple(owners[i].signed for i in chosen), tuple(owners[i].signature for i in chosen)
            )
            outgoing[j] = self._write(delivery, parts, j, digests).encode()
        for i in range(p.clients):
            if i not in owners:
                now.excluded[i] = "sent no Shares" if now.weights[i] else "filtered out"
        now.shares = {i: _kept(frame) for i, frame in owners.items()}
        return outgoing, m.Check

    def _propose(self, checks: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        letters: dict[int, dict[int, Tensor]] = {i: {} for i in now.shares}
        for j, frame in checks.items():
            message = frame.header.message
            assert isinstance(message, m.Check)
            words = to_elements(frame.parts[0], p.field)
            if words is not None:  # else it has no letter for anybody
                for i, letter in zip(message.owners, words.view(-1, p.copies), strict=True):
                    letters[i][j] = letter
        correctable(tuple(checks), p)
        choice = choose_owners(letters, tuple(sorted(checks)), p)
        view = View(
            number=now.number,
            accepted=choice.accepted,
            weights=tuple(now.weights[i] for i in choice.accepted),
            commitments=tuple(now.shares[i].digest for i in choice.accepted),
            suspects=choice.suspects,
            excluded=tuple(sorted({**now.excluded, **choice.excluded}.items())),
        )
        check_view(view, p)
        now.view = view
        proposal = m.Proposal(view.accepted, view.commitments, view.suspects, view.excluded)
        return self._to_all(proposal, (), checks), m.Agreement

    def _quorum(self, agreements: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        _need(agreements, self._parameters.quorum, "signatures")
        signers = tuple(sorted(agreements))
        quorum = m.Quorum(signers, tuple(agreements[j].signature for j in signers))
        return self._to_all(quorum, (), agreements), m.Sum

    def _result(self, sums: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        assert now.view is not None
        members, rows = self._canonical_sums(sums)
        errors = correctable(members, p)
        private = project(rows, self._randomness(32), p)  # nobody could make sums that go together under this one
        wrong = locate(p.code, members, private, errors)
        if wrong is None:
            raise ProtocolError("server", f"more than {errors} of {len(members)} coded sums are wrong")
        good = [row for row, j in enumerate(members) if j not in wrong][: p.code.threshold]
        chosen = rows[good] if good != list(range(len(good))) else rows[: len(good)]
        blocks = decode(chosen, [members[row] for row in good], p.code)
        parts: list[Part]
        if p.mode == "mask":
            blocks = self._unmask(blocks)
        parts = [to_bytes(blocks)]
        if p.proof == "V1":
            tags = [to_elements(now.shares[i].parts[-1], p.field) for i in now.view.accepted]
            parts.append(to_bytes(self._weighted(tags)))
        result = m.Result(
            now.view.digest,
            members,
            tuple(sums[j].header.digests[0] for j in members),
            tuple(sums[j].signature for j in members),
            wrong,
        )
        frame = self._write(result, parts, None)
        now.claim = verify.Claim(blocks=blocks, tag=None, result=result, digest=frame.digest)
        if p.proof == "V2":
            return self._broadcast(frame, sums), m.Projection
        self._finish(now.view, now.claim)
        return self._broadcast(frame, sums), None

    def _proof(self, projections: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        assert now.view is not None
        assert now.claim is not None
        letters = {j: letter for j in sorted(projections) if (letter := self._letter(j, projections[j])) is not None}
        members = tuple(letters)
        errors = correctable(members, p)
        wrong = locate(p.code, members, torch.stack(list(letters.values())), errors)
        if wrong is None:
            raise ProtocolError("server", f"more than {errors} of {len(members)} projections are wrong")
        masked = tuple(i for i in members if len(projections[i].parts) == 2)
        late = tuple(i for i in now.view.accepted if i not in masked) if p.mode == "mask" else ()
        proof = m.Proof(members, tuple(projections[j].signature for j in members), wrong, masked, late)
        parts: list[Part] = [b"".join(projections[j].parts[0] for j in members)]
        parts.append(b"".join(projections[j].parts[1] for j in masked))
        parts += [self._masked(i) for i in late]
        frame = self._write(proof, parts, None)
        self._conclude(now.view, now.claim, proof, frame)
        return self._broadcast(frame, projections), None

    def _canonical(self, parts: Sequence[Part]) -> bool:
        return all(to_elements(part, self._parameters.field) is not None for part in parts)

    def _canonical_sums(self, sums: dict[int, Frame]) -> tuple[tuple[int, ...], Tensor]:
        """Clients whose sums are elements of the field, and those sums [n, L]."""
        p = self._parameters
        rows = torch.empty(len(sums), p.share_length, dtype=p.field.dtype)
        members: list[int] = []
        for j in sorted(sums):
            if to_elements(sums[j].parts[0], p.field, out=rows[len(members)]) is not None:
                members.append(j)
        return tuple(members), rows[: len(members)]

    def _weighted(self, rows: Sequence[Tensor | None], minus: Tensor | None = None) -> Tensor:
        """Weighted sum of one row [n] for each accepted client, less another one."""
        p, view = self._parameters, self._round.view
        assert view is not None
        weights, found = list(view.weights), [row for row in rows if row is not None]
        if minus is not None:
            weights, found = [*weights, p.field.p - 1], [*found, minus]
        return multiply(matrix_of([weights], p.field, found[0].device), torch.stack(found), p.field)[0]

    def _unmask(self, mask: Tensor) -> Tensor:
        """The sum of the masked vectors less the sum of the masks: [K, L]."""
        p, view = self._parameters, self._round.view
        assert view is not None
        masked = [to_elements(self._masked(i), p.field) for i in view.accepted]
        return self._weighted(masked, minus=mask.view(-1)).view(mask.shape)

    def _masked(self, owner: int) -> Part:
        """The masked vector that an owner sent."""
        message = self._round.shares[owner].header.message
        assert isinstance(message, m.Shares)
        return self._round.shares[owner].parts[len(message.recipients)]

    def _letter(self, client: int, projection: Frame) -> Tensor | None:
        """A client's projection [copies], unless it is none or the client lies about its masked vector."""
        p, claim = self._parameters, self._round.claim
        assert claim is not None
        if len(projection.parts) == 2:
            masked = to_elements(self._masked(client), p.field)
            assert masked is not None  # or its Shares had been refused
            if to_bytes(project(masked.view(p.blocks, -1), claim.seed, p)) != projection.parts[1]:
                return None
        return to_elements(projection.parts[0], p.field)

    def _conclude(self, view: View, claim: verify.Claim, proof: m.Proof, frame: Frame) -> None:
        """Check as the clients will, whose signatures have been checked on arrival."""
        verify.check_fit(claim, view, proof, frame.parts, self._round.shares, self._parameters)
        self._finish(view, claim)

    def _finish(self, view: View, claim: verify.Claim) -> None:
        p = self._parameters
        self.outcome = Outcome(
            number=view.number,
            sum=claim.blocks.view(-1)[: p.length],
            accepted=view.accepted,
            weights=view.weights,
            excluded=view.excluded,
            wrong=tuple(sorted({*claim.result.wrong, *view.suspects})),
            clipped=None,
            mode=p.mode,
            proof=p.proof,
        )

    def _write(
        self, message: m.Message, parts: Sequence[Part], recipient: int | None, digests: Sequence[bytes] | None = None
    ) -> Frame:
        p = self._parameters
        return write(
            message, parts, parameters=p, identity=self._identity, number=self._round.number, sender=p.clients,
            recipient=recipient, digests=digests,
        )  # fmt: skip

    def _to_all(
        self, message: m.Message, parts: Sequence[Part], clients: Sequence[int] | Mapping[int, Frame]
    ) -> Outgoing:
        return self._broadcast(self._write(message, parts, None), clients)

    def _broadcast(self, frame: Frame, clients: Sequence[int] | Mapping[int, Frame]) -> Outgoing:
        return dict.fromkeys(sorted(clients), frame.encode())


def _need(answers: Sequence[int] | Mapping[int, Frame], least: int, what: str) -> None:
    if len(answers) < least:
        raise ProtocolError("server", f"has {len(answers)} {what}; {least} are needed")


def _kept(shares: Frame) -> Frame:
    """Shares without the sealed ones, which are delivered: the bytes they came in can go."""
    message = shares.header.message
    assert isinstance(message, m.Shares)
    sealed = len(message.recipients)
    parts = (b"",) * sealed + tuple(bytes(part) for part in shares.parts[sealed:])
    return Frame(header=shares.header, signature=shares.signature, parts=parts, signed=shares.signed)
