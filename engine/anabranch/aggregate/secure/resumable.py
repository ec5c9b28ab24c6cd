"""A client between two messages as bytes: for transports that start a new process for every message.

    client = ResumableClient(parameters, index, identity);  answer = client.hello();  kept = client.state()
    client = ResumableClient.resume(kept, parameters, identity);  answer = client.receive(message);  ...

A state is secret: it holds the session's key, shares of other clients, and in mask mode what the own vector is masked
with, indirectly. It belongs where the vector itself is.

A state is for one message. The promise that a client answers once, seals a round once and signs one set a round is a
promise about the client, not about an object: whoever resumes one state twice breaks it, and two Shares sealed from it
would use the same nonces. So the state that an answer leaves behind must have replaced the old one before the answer
leaves, and a lost state means a lost session; backups must not bring one back. `Once` holds a machine to it.
"""

import os
import secrets
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure import verify
from anabranch.aggregate.secure.client import Client, Round
from anabranch.aggregate.secure.errors import ProtocolError, cbor
from anabranch.aggregate.secure.keys import Identity, Randomness, SessionKey
from anabranch.aggregate.secure.outcome import View
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.wire import Frame, Header, to_bytes, to_elements


class ResumableClient(Client):
    """A Client whose state can be taken out and put into another; see the module."""

    def state(self) -> bytes:
        """All that the next message needs, and not the outcome of a finished round."""
        plain = [
            self._parameters.digest, self.index, self._key.secret, self._last,
            None if self.roster is None else self.roster.body(),
            None if self._round is None else self._round_as_plain(self._round),
        ]  # fmt: skip
        encoded: bytes = cbor().dumps(plain, canonical=True)
        return encoded

    @classmethod
    def resume(
        cls,
        state: bytes,
        parameters: Parameters,
        identity: Identity,
        *,
        group_key: bytes | None = None,
        randomness: Randomness = secrets.token_bytes,
    ) -> Self:
        """The client that had this state. Raises ValueError for the state of another session."""
        digest, index, key, last, roster, now = cbor().loads(state)
        if digest != parameters.digest:
            raise ValueError("the state is of another session, or of other parameters")
        client = cls(parameters, index, identity, group_key=group_key, randomness=randomness)
        client._key = SessionKey(lambda length: key)
        client._last = last
        client._round = None if now is None else client._round_of_plain(now)
        if roster is not None:
            client._know(m.Roster.of(roster, parameters))
        return client

    def _know(self, roster: m.Roster) -> None:
        """As `_meet`, whose checks were made when the roster came."""
        self.roster = roster
        others = [(i, public) for i, public in zip(roster.members, roster.publics, strict=True) if i != self.index]
        self._peers = {i: self._key.pair(self.index, i, public, self._parameters.session) for i, public in others}

    def _round_as_plain(self, now: Round) -> list[Any]:
        p = self._parameters
        width = p.share_length + p.copies
        rows = {} if now.sum is not None else {i: bytes(to_bytes(self._rows[i, :width])) for i in now.held}
        claim = now.claim and [_bytes(now.claim.blocks), now.claim.result.body(), now.claim.digest]
        return [
            now.number, m.KINDS.index(now.expects), list(now.weights), now.clipped, _bytes(now.masked),
            {i: [frame.signed, frame.signature] for i, frame in now.held.items()}, rows,
            now.view and list(astuple(now.view)), _bytes(now.sum), claim,
        ]  # fmt: skip

    def _round_of_plain(self, plain: list[Any]) -> Round:
        p = self._parameters
        number, expects, weights, clipped, masked, held, rows, view, total, claim = plain
        for i, row in rows.items():
            self._rows[i, : p.share_length + p.copies] = self._elements(row)
        now = Round(
            number=number,
            expects=m.KINDS[expects],
            weights=tuple(weights),
            clipped=clipped,
            masked=None if masked is None else self._elements(masked).view(p.blocks, p.share_length),
            sum=None if total is None else self._elements(total),
        )
        for i, (signed, signature) in held.items():
            now.held[i] = Frame(header=Header.decode(signed, p), signature=signature, parts=(), signed=signed)
        if view is not None:
            number, *sets, excluded = view
            accepted, weights, commitments, suspects = map(tuple, sets)
            now.view = View(
                number=number, accepted=accepted, weights=weights, commitments=commitments, suspects=suspects,
                excluded=tuple((i, reason) for i, reason in excluded),
            )  # fmt: skip
        if claim is not None:
            blocks = self._elements(claim[0]).view(p.blocks, p.share_length)
            result = m.Result.of(claim[1], p)
            # V2 alone keeps one.
            now.claim = verify.Claim(parameters=p, blocks=blocks, tag=None, result=result, digest=claim[2])
        return now

    def _elements(self, data: bytes) -> Tensor:
        elements = to_elements(data, self._parameters.field)
        if elements is None:
            raise ValueError("the state was damaged")
        return torch.clone(elements)


class Once:
    """A folder that remembers which states were used: each one is taken once, even by processes at the same time.

    folder   on a disk that no backup turns back; one file of no bytes for each message answered
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def take(self, state: bytes) -> None:
        """Before the answer made from it leaves. Raises ProtocolError if the state was taken before."""
        path = self.folder / sha256(state).hexdigest()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError as error:
            raise ProtocolError("this client", "has answered from this state before") from error


def _bytes(elements: Tensor | None) -> bytes | None:
    return None if elements is None else bytes(to_bytes(elements))
