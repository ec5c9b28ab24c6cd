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
from anabranch.aggregate.secure.proof import challenge, locate, project
from anabranch.aggregate.secure.wire import Frame, Part, digests_of, name, receive, to_bytes, to_elements, write
from anabranch_kernels.field_coding.op import decode, matrix_of, multiply
from anabranch_kernels.memory import prefer_huge_pages

Outgoing = dict[int, bytes]  # client -> message


@dataclass(kw_only=True)
class _Round:
    """What the server remembers of the round it is in."""

    number: int
    weights: tuple[int, ...]
    answers: dict[int, Frame] = field(default_factory=dict)  # of the step
    shares: dict[int, Frame] = field(default_factory=dict)
    masked: Tensor | None = None  # [N, K * L], in mask mode
    excluded: dict[int, str] = field(default_factory=dict)
    view: View | None = None
    sums: "_Sums | None" = None
    claim: verify.Claim | None = None


@dataclass(kw_only=True)
class _Sums:
    """Coded sums in the order of their arrival: rows [N, L], and a projection [copies] of each by a secret rho.

    Nobody could make wrong sums that go together under a rho that only the server knows. Each is projected when it
    arrives: it is in the cache then, and others are waited for anyway.
    """

    rows: Tensor
    rho: Tensor
    letters: dict[int, Tensor] = field(default_factory=dict)

    def add(self, client: int, data: Part, parameters: Parameters) -> None:
        """Nothing is added that is not canonical."""
        row = self.rows[len(self.letters)]
        if to_elements(data, parameters.field, out=row) is not None:
            self.letters[client] = project(row[None], self.rho, parameters)[0]


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
        if isinstance(message, m.Sum):
            assert now.sums is not None
            now.sums.add(frame.header.sender, frame.parts[0], p)
        now.answers[frame.header.sender] = frame

    def _check(self, frame: Frame) -> None:
        """Raises ProtocolError for answers that can be seen to be wrong at once."""
        now, message, sender = self._round, frame.header.message, frame.header.sender
        who = name(sender, self._parameters)
        if isinstance(message, m.Shares) and not self._take(sender, frame.parts[len(message.recipients) :]):
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
            delivery = m.Delivery(tuple(chosen), tuple(owners[i].signed for i in chosen))
            outgoing[j] = self._write(delivery, parts, j, digests).encode()
        for i in range(p.clients):
            if i not in owners:
                now.excluded[i] = "sent no Shares" if now.weights[i] else "filtered out"
        now.shares = {i: _kept(frame, p) for i, frame in owners.items()}
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
        p = self._parameters
        _need(agreements, p.quorum, "signatures")
        rows = prefer_huge_pages(torch.empty(p.clients, p.share_length, dtype=p.field.dtype))
        self._round.sums = _Sums(rows=rows, rho=challenge(self._randomness(32), p))
        signers = tuple(sorted(agreements))
        quorum = m.Quorum(signers, tuple(agreements[j].signature for j in signers))
        return self._to_all(quorum, (), agreements), m.Sum

    def _result(self, sums: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        assert now.view is not None
        assert now.sums is not None
        arrived, letters = tuple(now.sums.letters), now.sums.letters
        members = tuple(sorted(arrived))
        errors = correctable(members, p)
        wrong = locate(p.code, members, torch.stack([letters[j] for j in members]), errors)
        if wrong is None:
            raise ProtocolError("server", f"more than {errors} of {len(members)} coded sums are wrong")
        good = [row for row, j in enumerate(arrived) if j not in wrong][: p.code.threshold]
        rows = now.sums.rows
        chosen = rows[good] if good != list(range(len(good))) else rows[: len(good)]
        blocks = decode(chosen, [arrived[row] for row in good], p.code)
        if p.mode == "mask":
            blocks = self._unmask(blocks)
        parts: list[Part] = [to_bytes(block) for block in blocks]
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
        now.claim = verify.Claim(parameters=p, blocks=blocks, tag=None, result=result, digest=frame.digest)
        if p.proof == "V2":
            return self._broadcast(frame, sums), m.Projection
        self._finish(now.view, now.claim)
        return self._broadcast(frame, sums), None

    def _proof(self, projections: dict[int, Frame]) -> tuple[Outgoing, type[m.Message] | None]:
        p, now = self._parameters, self._round
        assert now.view is not None
        assert now.claim is not None
        words = {j: to_elements(projections[j].parts[0], p.field) for j in sorted(projections)}
        letters = {j: word for j, word in words.items() if word is not None}
        try:
            frame = self._gather(projections, letters)
        except ProtocolError:  # maybe since an owner lies about its masked vector, which takes long to find out
            right = {j: word for j, word in letters.items() if self._is_right(j, projections[j])}
            if len(right) == len(letters):
                raise
            frame = self._gather(projections, right)
        self._finish(now.view, now.claim)
        return self._broadcast(frame, projections), None

    def _gather(self, projections: dict[int, Frame], letters: dict[int, Tensor]) -> Frame:
        """The proof from the projections of these clients, if it is one."""
        p, now = self._parameters, self._round
        assert now.view is not None
        assert now.claim is not None
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
        digests = [*digests_of(parts), *(self._masked(i)[1] for i in late)]
        parts += [self._masked(i)[0] for i in late]
        frame = self._write(proof, parts, None, digests)
        self._conclude(now.view, now.claim, proof, frame)
        return frame

    def _take(self, owner: int, parts: Sequence[Part]) -> bool:
        """Keep an owner's masked vector; whether that and its tag are canonical."""
        p, now = self._parameters, self._round
        if p.mode == "direct":
            return all(to_elements(part, p.field) is not None for part in parts)
        if now.masked is None:
            now.masked = prefer_huge_pages(torch.zeros(p.clients, p.blocks * p.share_length, dtype=p.field.dtype))
        masked, *tags = parts
        return (
            all(to_elements(tag, p.field) is not None for tag in tags)
            and to_elements(masked, p.field, out=now.masked[owner]) is not None
        )

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
        view, p = self._round.view, self._parameters
        assert view is not None
        both = torch.stack([self._sum_of_masked(view.accepted), mask.view(-1)])
        return multiply(matrix_of([[1, p.field.p - 1]], p.field, mask.device), both, p.field).view(mask.shape)

    def _sum_of_masked(self, owners: Sequence[int]) -> Tensor:
        """The weighted sum [K * L] of these owners' masked vectors, in one product."""
        view, p = self._round.view, self._parameters
        assert view is not None
        assert self._round.masked is not None
        weights = [0] * p.clients
        for owner in owners:
            weights[owner] = view.weights[view.accepted.index(owner)]
        return multiply(matrix_of([weights], p.field, self._round.masked.device), self._round.masked, p.field)[0]

    def _masked(self, owner: int) -> tuple[Part, bytes]:
        """The masked vector that an owner sent, and its digest."""
        header = self._round.shares[owner].header
        assert isinstance(header.message, m.Shares)
        assert self._round.masked is not None
        return to_bytes(self._round.masked[owner]), header.digests[len(header.message.recipients)]

    def _is_right(self, client: int, projection: Frame) -> bool:
        """Whether what a client says about its masked vector, if anything, is right."""
        p, claim, masked = self._parameters, self._round.claim, self._round.masked
        assert claim is not None
        if len(projection.parts) == 1:
            return True
        assert masked is not None
        return to_bytes(claim.project(masked[client].view(p.blocks, -1))) == projection.parts[1]

    def _conclude(self, view: View, claim: verify.Claim, proof: m.Proof, frame: Frame) -> None:
        """Check as the clients will, whose signatures have been checked on arrival."""
        p = self._parameters
        late = self._sum_of_masked(proof.late).view(p.blocks, -1) if proof.late else None
        verify.check_fit(claim, view, proof, frame.parts, late, p)

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


def _kept(shares: Frame, parameters: Parameters) -> Frame:
    """Shares without the sealed ones, which are delivered, and the masked vector: the bytes they came in can go."""
    message = shares.header.message
    assert isinstance(message, m.Shares)
    sealed = len(message.recipients)
    masked = parameters.mode == "mask"
    parts = (b"",) * (sealed + masked) + tuple(bytes(part) for part in shares.parts[sealed + masked :])
    return Frame(header=shares.header, signature=shares.signature, parts=parts, signed=shares.signed)
