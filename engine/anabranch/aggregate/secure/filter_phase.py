"""Before a round: hashes of logits, committed to before any is revealed, and one verdict for everybody.

    Commit   i -> server   SHA-256(label, beacon, i, nonce, hash)          nonce: 32 secret random bytes
    Commits  server -> all all commitments, with their owners' signatures
    Reveal   i -> server   digest of the Commits seen, nonce, hash
    Reveals  server -> all all reveals, with their owners' signatures

    phase = ClientFilter(parameters, index, identity, number, roster, settings)
    to_server = phase.commit(hash_logits(logits, phase.beacon, settings, assigned))
    to_server = phase.receive(commits);  phase.receive(reveals)
    client.share(number, vector, weights=phase.outcome.weights)

and ServerFilter with `receive` and `advance`, as Server. All verdicts are the same function of the same reveals. Were
they not, clients would share with different weights, and the round's Agreement would find no quorum.

A commitment binds session, round and sender, so that neither it nor its opening is good for anybody else or again; a
Reveal names the Commits its sender had seen, so that a server cannot show one client's hash to another that has yet to
commit. One that does not commit or reveal, or reveals something else, has weight zero, with the reason.

The beacon, from which projections are drawn, is a digest of the session's parameters, its keys (the Roster), the round
and the filter's settings: fixed before anybody has logits of the round. Whoever says Hello last, or the server by
leaving Hellos out, could try keys until the beacon of some round suits them, at the price of one trial for each; nobody
can later. It is no secret: a client can know all rounds' projections from the start.

Not prevented: the server may leave out a client's commitment or reveal, as it may leave out its Shares; a server that
works with a poisoner may give up one client, hide its reveal from the others, and let the poisoner copy it, if the
others are shown a later set of commitments; and a client may hash good logits and share others.
"""

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from anabranch.aggregate.secure import filtration, verify
from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError, cbor
from anabranch.aggregate.secure.filtration import Filtration, Hash
from anabranch.aggregate.secure.keys import Identity, Randomness
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.proof import digest_of
from anabranch.aggregate.secure.wire import Frame, Part, name, receive, write

LEAST = 3  # hashes: a median of others takes three


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """weights of all clients for the round, zero for those left out, and the reason for each of these."""

    weights: tuple[int, ...]
    reasons: tuple[tuple[int, str], ...]


def beacon_of(parameters: Parameters, number: int, roster: m.Roster, settings: Filtration) -> bytes:
    """32 public bytes of this round's filter, the same for all who met by this roster."""
    if (size := filtration.encoded_bytes(settings)) > m.MOST_HASH:
        raise ValueError(f"a hash of {settings.classes} times {settings.bits} bits has {size} bytes; {m.MOST_HASH} fit")
    plain = [number, roster.body(), list(astuple(settings))]
    encoded: bytes = cbor().dumps(plain, canonical=True)
    return digest_of("filter", parameters.digest, encoded)


def commitment_of(beacon: bytes, client: int, nonce: bytes, bits: bytes) -> bytes:
    """What a client says before it says its hash."""
    return digest_of("commit", beacon, client.to_bytes(4, "big"), nonce, bits)


def weights_of(hashes: Mapping[int, bytes | str], parameters: Parameters, settings: Filtration) -> Filtered:
    """The verdict over encoded hashes by client, or the reason why there is none.

    A client's weight is that of the parameters times its verdict's share of most_weight, rounded down, one at least.
    Raises ProtocolError for fewer than three hashes.
    """
    reasons = {i: said for i, said in hashes.items() if isinstance(said, str)}
    found: dict[int, Hash] = {}
    for i, said in sorted(hashes.items()):
        if isinstance(said, bytes):
            try:
                found[i] = filtration.decode(said, settings)
            except ValueError as error:
                reasons[i] = f"revealed no hash: {error}"
    if len(found) < LEAST:
        raise ProtocolError("server", f"{len(found)} clients revealed their hashes; {LEAST} are needed")
    verdict = filtration.judge(list(found.values()), settings)
    weights = dict.fromkeys(range(parameters.clients), 0)
    for i, weight, kept in zip(found, verdict.weights.tolist(), verdict.kept.tolist(), strict=True):
        if weight:
            weights[i] = max(1, parameters.all_weights[i] * weight // settings.most_weight)
        else:
            reasons[i] = "its logits are in few others' groups" if kept else "its logits are unlike the others'"
    return Filtered(weights=tuple(weights.values()), reasons=tuple(sorted(reasons.items())))


def opened(
    commits: m.Commits, reveals: Mapping[int, m.Reveal], beacon: bytes, parameters: Parameters
) -> dict[int, bytes | str]:
    """For each client its hash, or why it has none."""
    said: dict[int, bytes | str] = dict.fromkeys(range(parameters.clients), "did not commit to a hash")
    seen = commits.digest
    for i, commitment in zip(commits.members, commits.commitments, strict=True):
        if i not in reveals:
            said[i] = "did not reveal its hash"
            continue
        reveal = reveals[i]
        if not hmac.compare_digest(reveal.commits, seen):
            said[i] = "revealed its hash for other commitments"
        elif not hmac.compare_digest(commitment_of(beacon, i, reveal.nonce, reveal.bits), commitment):
            said[i] = "revealed another hash than it committed to"
        else:
            said[i] = reveal.bits
    return said


class ClientFilter:
    """A client in the phase before one round; see the module."""

    def __init__(
        self,
        parameters: Parameters,
        index: int,
        identity: Identity,
        number: int,
        roster: m.Roster,
        settings: Filtration,
        *,
        randomness: Randomness = secrets.token_bytes,
    ) -> None:
        """roster: Client.roster. number: that of the round, with which no other phase was or will be opened."""
        self.beacon = beacon_of(parameters, number, roster, settings)
        self.outcome: Filtered | None = None
        self._parameters, self._index, self._identity, self._number = parameters, index, identity, number
        self._settings, self._randomness = settings, randomness
        self._own: m.Reveal | None = None
        self._commits: m.Commits | None = None

    def commit(self, hash: Hash) -> bytes:
        """The first message, for a hash by this phase's beacon; a second hash is refused."""
        if self._own is not None:
            raise ProtocolError(name(self._index, self._parameters), "has committed to a hash before")
        bits = filtration.encode(hash)
        filtration.decode(bits, self._settings)  # raises ValueError for a hash by other settings
        self._own = m.Reveal(bytes(32), self._randomness(32), bits)
        commitment = commitment_of(self.beacon, self._index, self._own.nonce, bits)
        return self._write(m.Commit(commitment)).encode()

    def receive(self, data: Part) -> bytes | None:
        """Take Commits, which the Reveal answers, or Reveals, after which `outcome` is there."""
        p = self._parameters
        frame = receive(data, p, recipient=self._index, senders=range(p.clients, p.clients + 1))
        message, number = frame.header.message, frame.header.number
        due = m.Commits if self._commits is None else m.Reveals
        if type(message) is not due or number != self._number or self._own is None or self.outcome is not None:
            raise ProtocolError("server", f"sent {type(message).__name__} of round {number}, which is not due")
        if isinstance(message, m.Commits):
            return self._reveal(self._own, message)
        assert isinstance(message, m.Reveals)
        self._judge(message)
        return None

    def _reveal(self, own: m.Reveal, commits: m.Commits) -> bytes:
        p = self._parameters
        for i, commitment, signature in zip(commits.members, commits.commitments, commits.signatures, strict=True):
            if not verify.said(m.Commit(commitment), (), signature, i, self._number, p):
                raise ProtocolError("server", f"its commitment of {name(i, p)} is not signed by that client")
            if i == self._index and commitment != commitment_of(self.beacon, i, own.nonce, own.bits):
                raise ProtocolError("server", "shows another commitment of this client")
        if self._index not in commits.members:
            raise ProtocolError("server", "leaves out this client's commitment")
        self._commits = commits
        self._own = m.Reveal(commits.digest, own.nonce, own.bits)
        return self._write(self._own).encode()

    def _judge(self, reveals: m.Reveals) -> None:
        p = self._parameters
        assert self._commits is not None
        said = {}
        for i, commits, nonce, bits, signature in zip(
            reveals.members, reveals.commits, reveals.nonces, reveals.bits, reveals.signatures, strict=True
        ):
            said[i] = m.Reveal(commits, nonce, bits)
            if not verify.said(said[i], (), signature, i, self._number, p):
                raise ProtocolError("server", f"its reveal of {name(i, p)} is not signed by that client")
        self.outcome = weights_of(opened(self._commits, said, self.beacon, p), p, self._settings)

    def _write(self, message: m.Message) -> Frame:
        p = self._parameters
        return write(
            message, (), parameters=p, identity=self._identity, number=self._number, sender=self._index,
            recipient=p.clients,
        )  # fmt: skip


class ServerFilter:
    """The server in the phase before one round: `advance` after the Commits, and after the Reveals."""

    def __init__(
        self, parameters: Parameters, identity: Identity, number: int, roster: m.Roster, settings: Filtration
    ) -> None:
        """roster: Server.roster."""
        self.beacon = beacon_of(parameters, number, roster, settings)
        self.outcome: Filtered | None = None
        self._parameters, self._identity, self._number, self._settings = parameters, identity, number, settings
        self._answers: dict[int, Frame] = {}
        self._commits: m.Commits | None = None

    def receive(self, data: Part) -> None:
        """Take a client's message; a second one is refused, and a Reveal without a Commit."""
        p = self._parameters
        frame = receive(data, p, recipient=p.clients, senders=range(p.clients))
        message, number, sender = frame.header.message, frame.header.number, frame.header.sender
        due = m.Commit if self._commits is None else m.Reveal
        if type(message) is not due or number != self._number or self.outcome is not None:
            raise ProtocolError(name(sender, p), f"sent {type(message).__name__} of round {number}, which is not due")
        if sender in self._answers or (self._commits is not None and sender not in self._commits.members):
            raise ProtocolError(name(sender, p), f"sent {type(message).__name__} twice, or without a commitment")
        self._answers[sender] = frame

    def advance(self) -> dict[int, bytes]:
        """Close the step: Commits for all who committed, then Reveals for all who revealed, and the outcome.

        Raises ProtocolError while fewer than three are there.
        """
        p, members = self._parameters, tuple(sorted(self._answers))
        if self.outcome is not None:
            raise ProtocolError("server", "the filter has come to its end")
        if len(members) < LEAST:
            raise ProtocolError("server", f"has {len(members)} commitments or reveals; {LEAST} are needed")
        signatures = tuple(self._answers[i].signature for i in members)
        said = [self._answers[i].header.message for i in members]
        message: m.Message
        if self._commits is None:
            message = self._commits = m.Commits(
                members, tuple(one.commitment for one in said if isinstance(one, m.Commit)), signatures
            )
        else:
            reveals = [one for one in said if isinstance(one, m.Reveal)]
            hashes = opened(self._commits, dict(zip(members, reveals, strict=True)), self.beacon, p)
            self.outcome = weights_of(hashes, p, self._settings)
            message = m.Reveals(
                members, tuple(one.commits for one in reveals), tuple(one.nonce for one in reveals),
                tuple(one.bits for one in reveals), signatures,
            )  # fmt: skip
        self._answers = {}
        frame = write(
            message, (), parameters=p, identity=self._identity, number=self._number, sender=p.clients, recipient=None
        )
        return dict.fromkeys(members, frame.encode())
