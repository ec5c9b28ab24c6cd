"""A client: owner of a vector and holder of one share of everybody's. Bytes in, bytes out, over any transport.

    client = Client(parameters, index, identity)
    to_server = client.hello();  client.receive(roster)
    to_server = client.share(1, vector)
    to_server = client.receive(message)  for each message of the server, until client.outcome is there

Whatever is wrong raises ProtocolError and changes nothing. What a client answers is said once in a round: it never
projects shares twice nor signs two sets, or its answers together would tell a lying server more than the sum.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure import verify
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import Identity, KeyStream, Randomness, SessionKey, seal, unseal
from anabranch.aggregate.secure.outcome import Outcome, View, check_view
from anabranch.aggregate.secure.parameters import VERSION, Parameters
from anabranch.aggregate.secure.proof import digest_of, folded, mac, mac_key, mac_mask, project_each
from anabranch.aggregate.secure.wire import (
    Frame,
    Header,
    Part,
    blank,
    digests_of,
    is_canonical,
    name,
    receive,
    to_bytes,
    write,
)
from anabranch_kernels.field_coding.op import encode, multiply, quantise
from anabranch_kernels.memory import prefer_huge_pages

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM


@dataclass(kw_only=True)
class Round:
    """What a client remembers of the round it is in."""

    number: int
    expects: type[m.Message] = m.Delivery
    weights: tuple[int, ...]  # of all clients; 0 for those who may not be in the sum
    clipped: int
    masked: Tensor | None  # [K, L], in mask mode
    held: dict[int, Frame] = field(default_factory=dict)  # Shares whose share is in the rows; parts are not kept
    view: View | None = None
    sum: Tensor | None = None  # [L]
    claim: verify.Claim | None = None


class Client:
    """One client of a session; see the module."""

    def __init__(
        self,
        parameters: Parameters,
        index: int,
        identity: Identity,
        *,
        group_key: bytes | None = None,
        randomness: Randomness = secrets.token_bytes,
    ) -> None:
        """group_key: 32 bytes that clients know and the server does not, for V1 only. randomness: for tests only."""
        if not 0 <= index < parameters.clients or parameters.identities[index] != identity.public:
            raise ValueError(f"the parameters know another client {index}")
        if (group_key is None) == (parameters.proof == "V1") or len(group_key or bytes(32)) != 32:
            raise ValueError("a group_key of 32 bytes is needed for proof V1, and for no other")
        self.index = index
        self.outcome: Outcome | None = None
        self._parameters = parameters
        self._identity = identity
        self._group_key = group_key
        self._randomness = randomness
        self._key = SessionKey(randomness)
        self.roster: m.Roster | None = None  # the session's keys, once they are known
        self._peers: dict[int, tuple[AESGCM, AESGCM]] | None = None  # for sending, for receiving
        self._last = 0
        self._round: Round | None = None
        width = folded(m.share_bytes(parameters) // parameters.field.bytes)
        rows = torch.empty(parameters.clients, width, dtype=parameters.field.dtype)
        self._rows = prefer_huge_pages(rows).zero_()  # shares, then zeros

    def hello(self) -> bytes:
        """The first message to the server."""
        return self._write(m.Hello(self._key.public), (), 0).encode()

    def share(self, number: int, vector: Tensor, *, weights: tuple[int, ...] | None = None) -> Part:
        """Begin round `number`, higher than any before, with a vector [l] of finite floats; returns Shares.

        weights   of all clients in this round, at most those of the parameters; 0 keeps a client out. All clients must
                  give the same. None for those of the parameters
        """
        p = self._parameters
        if self._peers is None:
            raise ProtocolError(name(self.index, p), "has no session keys yet")
        if not self._last < number < 2**32:
            raise ProtocolError(name(self.index, p), f"round {number} does not come after round {self._last}")
        if vector.shape != (p.length,):
            raise ValueError(f"vector must be [{p.length}], got {list(vector.shape)}")
        if weights is not None and (
            len(weights) != p.clients or any(not 0 <= w <= most for w, most in zip(weights, p.all_weights, strict=True))
        ):
            raise ValueError(f"weights must be 0 to {p.all_weights}, got {weights}")
        elements, clipped = quantise(vector, p.field, p.fixed_point)
        missing = p.blocks * p.share_length - p.length
        blocks = torch.nn.functional.pad(elements, (0, missing)) if missing else elements
        blocks = blocks.view(p.blocks, p.share_length)
        self._last, self.outcome = number, None  # from here on this round's nonces are used
        shares, masked = self._code(blocks)
        frame, message = self._seal(number, shares, masked, blocks)
        if self._round is not None:  # which was given up
            self._rows.zero_()
        width = p.share_length + p.copies
        self._rows[self.index, :width] = shares[self.index, :width]
        self._round = Round(number=number, weights=weights or p.all_weights, clipped=clipped, masked=masked)
        self._round.held[self.index] = frame
        return message

    def receive(self, data: Part) -> bytes | None:
        """Take a message of the server; returns the answer to it, if it has one."""
        p = self._parameters
        frame = receive(data, p, recipient=self.index, senders=range(p.clients, p.clients + 1))
        message, now = frame.header.message, self._round
        expected = m.Roster if self._peers is None else now.expects if now else None
        number = 0 if self._peers is None or now is None else now.number
        if type(message) is not expected or frame.header.number != number:
            wanted = f"{expected.__name__} of round {number}" if expected else "nothing"
            raise ProtocolError(
                "server", f"sent {type(message).__name__} of round {frame.header.number}; {wanted} is due"
            )
        if isinstance(message, m.Roster):
            self._meet(message)
            return None
        assert now is not None
        if isinstance(message, m.Delivery):
            return self._check(now, message, frame)
        if isinstance(message, m.Proposal):
            return self._agree(now, message)
        if isinstance(message, m.Quorum):
            return self._sum(now, message)
        if isinstance(message, m.Result):
            return self._project(now, message, frame)
        assert isinstance(message, m.Proof)
        self._accept(now, message, frame)
        return None

    def _meet(self, roster: m.Roster) -> None:
        p, peers = self._parameters, {}
        if self.index not in roster.members:
            raise ProtocolError("server", f"its roster leaves out client {self.index}")
        for index, public, signature in zip(roster.members, roster.publics, roster.signatures, strict=True):
            if not verify.said(m.Hello(public), (), signature, index, 0, p):
                raise ProtocolError("server", f"its session key of {name(index, p)} is not signed by that client")
            if index == self.index:
                continue
            try:
                peers[index] = self._key.pair(self.index, index, public, p.session)
            except ValueError as error:
                raise ProtocolError(name(index, p), "its session key has low order") from error
        self._peers, self.roster = peers, roster

    def _code(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shares [N, L + copies + salt] of the blocks, or of a mask and then the masked blocks too."""
        p = self._parameters
        U, L, C = p.code.threshold, p.share_length, p.copies
        stream = KeyStream(self._randomness(32))
        values = prefer_huge_pages(torch.empty(U, m.share_bytes(p) // p.field.bytes, dtype=p.field.dtype))
        masked = None
        if p.mode == "mask":
            mask = stream.elements(p.blocks * L, p.field)
            both = torch.stack([blocks.view(-1), mask])
            masked = multiply(torch.ones(1, 2, dtype=p.field.dtype), both, p.field).view(p.blocks, L)
            blocks = mask.view(p.blocks, L)
        values[: p.blocks, :L] = blocks
        for noise in values[p.blocks :]:  # one by one: what is short stays in a cache
            noise[:L] = stream.elements(L, p.field)
        values[:, L : L + C] = stream.elements(U * C, p.field).view(U, C)  # polynomials that hide the owner's check
        values[:, L + C :] = 0
        shares = encode(values, p.code)
        salts = shares[:, L + C :]
        salts[:] = stream.elements(salts.numel(), p.field).view(salts.shape)
        values.zero_()  # noise and shares together would tell the vector
        return shares, masked

    def _seal(self, number: int, shares: Tensor, masked: Tensor | None, blocks: Tensor) -> tuple[Frame, memoryview]:
        """Shares, and its bytes, in which the shares are sealed where they will lie."""
        p = self._parameters
        assert self._peers is not None
        recipients, peers = sorted(self._peers), self._peers
        plain = [to_bytes(shares[j]) for j in recipients]
        open_parts = [] if masked is None else [to_bytes(masked)]
        if self._group_key is not None:
            mask = mac_mask(self._group_key, number, self.index, p)
            open_parts.append(to_bytes(mac(mac_key(self._group_key, number, p), blocks, mask, p)))
        digests = digests_of(plain) + digests_of(open_parts)
        frame = self._write(m.Shares(tuple(recipients)), (), number, digests)
        data, parts = blank(frame, p)
        for j, share, part in zip(recipients, plain, parts, strict=False):
            seal(peers[j][0], share, part, number, self._context(number, self.index, j, frame))
        for part, known in zip(parts[len(recipients) :], open_parts, strict=True):
            part[:] = known
        return frame, data

    def _check(self, now: Round, delivery: m.Delivery, frame: Frame) -> bytes:
        p = self._parameters
        L, C = p.share_length, p.copies
        if self.index in delivery.owners:  # whose share is in its row already, and not to be touched
            raise ProtocolError("server", f"delivers a share of {name(self.index, p)} to itself")
        held, refused = dict(now.held), []
        opened = [
            self._open(now, owner, signed, memoryview(part))
            for owner, signed, part in zip(delivery.owners, delivery.headers, frame.parts, strict=True)
        ]
        digests = digests_of([self._plain(owner) for owner in delivery.owners])
        for owner, shares, digest in zip(delivery.owners, opened, digests, strict=True):
            reason = shares if isinstance(shares, str) else self._fault(shares, digest)
            if isinstance(shares, Frame) and not reason:
                held[owner] = shares
            else:
                self._rows[owner] = 0
                refused.append((owner, reason))
        hiding = self._rows[:, L : L + C].clone()
        self._rows[:, L:] = 0
        owners = sorted(i for i in held if i != self.index or now.weights[i])  # the own one may be filtered out
        rows = self._rows if len(owners) == p.clients else self._rows[owners]
        projected = project_each(rows, [digest_of("owner", held[i].digest) for i in owners], p)
        both = torch.stack([projected.view(-1), hiding[owners].view(-1)])
        words = multiply(torch.ones(1, 2, dtype=p.field.dtype), both, p.field)
        now.held, now.expects = held, m.Proposal
        return self._write(m.Check(tuple(owners), tuple(refused)), (to_bytes(words),), now.number).encode()

    def _open(self, now: Round, owner: int, signed: bytes, sealed: memoryview) -> Frame | str:
        """Decrypt an owner's share into its row; the frame of its Shares, or why there is none.

        That the owner made this header needs no signature: its share opens under no other.
        """
        p = self._parameters
        if self._peers is None or owner not in self._peers:
            return "did not say hello"
        try:
            header = Header.decode(signed, p)
        except m.Malformed as error:
            return f"malformed header: {error}"
        message = header.message
        if not isinstance(message, m.Shares) or self.index not in message.recipients:
            return "no share for this client"
        if (header.number, header.sender, header.recipient) != (now.number, owner, p.clients):
            return "a header of another round or client"
        shares = Frame(header=header, signature=b"", parts=(), signed=signed)
        context = self._context(now.number, owner, self.index, shares)
        if not unseal(self._peers[owner][1], sealed, self._plain(owner), now.number, context):
            return "the share was not sealed for this client and round, or not with this header"
        return shares

    def _plain(self, owner: int) -> memoryview:
        """The share that was decrypted, with its salt."""
        return to_bytes(self._rows[owner])[: m.share_bytes(self._parameters)]

    def _fault(self, shares: Frame, digest: bytes) -> str:
        """What is wrong with a decrypted share of this digest, if anything is."""
        p, message = self._parameters, shares.header.message
        assert isinstance(message, m.Shares)
        if shares.header.digests[message.recipients.index(self.index)] != digest:
            return "the share is not the one it committed to"
        row = self._rows[shares.header.sender, : p.share_length + p.copies]
        return "" if is_canonical(row.numpy(), p.field) else "the share has elements that are not canonical"

    def _agree(self, now: Round, proposal: m.Proposal) -> bytes:
        p = self._parameters
        view = View(
            number=now.number,
            accepted=proposal.accepted,
            weights=tuple(now.weights[i] for i in proposal.accepted),
            commitments=proposal.commitments,
            suspects=proposal.suspects,
            excluded=proposal.excluded,
        )
        check_view(view, p)
        for owner, weight, commitment in zip(view.accepted, view.weights, view.commitments, strict=True):
            if weight == 0:
                raise ProtocolError("server", f"{name(owner, p)} is in the sum and was filtered out")
            if owner in now.held and now.held[owner].digest != commitment:
                raise ProtocolError("server", f"shows different Shares of {name(owner, p)}")
        now.view, now.expects = view, m.Quorum
        return self._write(m.Agreement(view.digest), (), now.number).encode()

    def _sum(self, now: Round, quorum: m.Quorum) -> bytes | None:
        p = self._parameters
        assert now.view is not None
        if len(quorum.signers) < p.quorum:
            raise ProtocolError("server", f"{len(quorum.signers)} clients agreed; {p.quorum} are needed")
        agreement = m.Agreement(now.view.digest)
        said = [(who, agreement, (), one) for who, one in zip(quorum.signers, quorum.signatures, strict=True)]
        if (liar := verify.first_unsaid(said[: p.quorum], now.number, p)) is not None:
            raise ProtocolError("server", f"{name(liar, p)} did not agree to the set shown here")
        now.expects = m.Result
        if self.index in now.view.suspects or not set(now.view.accepted) <= set(now.held):
            return None  # nothing to add to the sum, but its proof can be followed
        weights = torch.zeros(1, p.clients, dtype=p.field.dtype)
        weights[0, list(now.view.accepted)] = torch.tensor(now.view.weights, dtype=p.field.dtype)
        now.sum = multiply(weights, self._rows, p.field)[0, : p.share_length]
        self._rows.zero_()
        return self._write(m.Sum(now.view.digest), (to_bytes(now.sum),), now.number).encode()

    def _project(self, now: Round, result: m.Result, frame: Frame) -> bytes | None:
        p = self._parameters
        assert now.view is not None
        own = None if now.sum is None else to_bytes(now.sum)
        claim = verify.claim_of(result, frame, now.view, p, self.index, own)
        if p.proof != "V2":
            if p.proof == "V0":
                verify.check_signatures(claim, now.view, p)
            else:
                assert self._group_key is not None
                verify.check_tags(claim, now.view, p, self._group_key)
            self._finish(now, claim)
            return None
        now.claim, now.expects = claim, m.Proof
        if now.sum is None:
            return None
        parts = [to_bytes(claim.project(now.sum[None]))]
        if now.masked is not None and self.index in now.view.accepted:
            parts.append(to_bytes(claim.project(now.masked)))
        return self._write(m.Projection(frame.digest, len(parts) - 1), parts, now.number).encode()

    def _accept(self, now: Round, proof: m.Proof, frame: Frame) -> None:
        assert now.view is not None
        assert now.claim is not None
        verify.check_projections(now.claim, now.view, proof, frame.parts, now.held, self._parameters)
        self._finish(now, now.claim)

    def _finish(self, now: Round, claim: verify.Claim) -> None:
        p = self._parameters
        assert now.view is not None
        self.outcome = Outcome(
            number=now.number,
            sum=claim.blocks.view(-1)[: p.length],
            accepted=now.view.accepted,
            weights=now.view.weights,
            excluded=now.view.excluded,
            wrong=tuple(sorted({*claim.result.wrong, *now.view.suspects})),
            clipped=now.clipped,
            mode=p.mode,
            proof=p.proof,
        )
        self._round = None

    def _write(
        self, message: m.Message, parts: Sequence[Part], number: int, digests: Sequence[bytes] | None = None
    ) -> Frame:
        p = self._parameters
        return write(
            message, parts, parameters=p, identity=self._identity, number=number, sender=self.index,
            recipient=p.clients, digests=digests,
        )  # fmt: skip

    def _context(self, number: int, owner: int, recipient: int, shares: Frame) -> bytes:
        """Additional data of a share sealed under this header; the chunk and the number of chunks follow it."""
        who = b"".join(x.to_bytes(4, "big") for x in (number, owner, recipient))
        return bytes([VERSION]) + self._parameters.digest + who + shares.digest
