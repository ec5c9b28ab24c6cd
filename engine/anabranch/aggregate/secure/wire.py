"""How a message is written: a signed header in canonical CBOR that commits to the parts behind it, then the parts.

    u32 length of the header | header | Ed25519 signature of the header, 64 bytes | parts, one after another
    header = [version, kind, p, parameters' digest, round, sender, recipient, body, [SHA-256 of each part]]

Sealed shares, and parts that are passed on, have the digest that their first sender committed to (Message.vouched).
How long each part is follows from the parameters and the body, so nothing in a message can be written in two ways: what
decodes encodes to the same bytes. Parts are views into the bytes received; vectors are little-endian elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.aggregate.secure.errors import ProtocolError, cbor
from anabranch.aggregate.secure.keys import Identity, is_signed
from anabranch.aggregate.secure.messages import KINDS, Malformed, Message, all_octets, integer
from anabranch.aggregate.secure.parameters import VERSION, Parameters
from anabranch.aggregate.secure.threads import each
from anabranch_kernels.field_coding.op import Field
from anabranch_kernels.memory import prefer_huge_pages

SIGNATURE = 64
Part = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who says what to whom. Clients are 0 … N - 1, the server is N, and recipient None is everybody."""

    number: int  # of the round, 0 before the first
    sender: int
    recipient: int | None
    message: Message
    digests: tuple[bytes, ...]  # of the parts

    def encode(self, parameters: Parameters) -> bytes:
        """Canonical CBOR."""
        kind = KINDS.index(type(self.message))
        body, digests = self.message.body(), list(self.digests)
        who = [self.number, self.sender, self.recipient]
        plain = [VERSION, kind, parameters.field.p, parameters.digest, *who, body, digests]
        header: bytes = cbor().dumps(plain, canonical=True)
        return header

    @staticmethod
    def decode(header: bytes, parameters: Parameters) -> "Header":
        """Raises Malformed for anything that does not encode to the same bytes."""
        try:
            plain = cbor().loads(header, max_depth=8, allow_indefinite=False)
        except Exception as error:  # tags may run any of cbor2's own decoders, and each fails in its own way
            raise Malformed("its header is not CBOR") from error
        if type(plain) is not list or len(plain) != 9:
            raise Malformed("its header is not a list of nine")
        version, kind, p, digest, number, sender, recipient, body, digests = plain
        if (version, p, digest) != (VERSION, parameters.field.p, parameters.digest):
            raise Malformed("it belongs to another session, or to other parameters")
        N = parameters.clients
        message = KINDS[integer(kind, len(KINDS) - 1)].of(body, parameters)
        decoded = Header(
            number=integer(number, 2**32 - 1),
            sender=integer(sender, N),
            recipient=None if recipient is None else integer(recipient, N),
            message=message,
            digests=all_octets(digests, 32, len(message.lengths(parameters))),
        )
        if decoded.encode(parameters) != header:
            raise Malformed("its header is not canonical CBOR")
        return decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A whole message, as it was received or is to be sent."""

    header: Header
    signature: bytes
    parts: tuple[Part, ...]
    signed: bytes  # the header's bytes

    def encode(self) -> bytes:
        """The bytes to send."""
        return b"".join((len(self.signed).to_bytes(4, "little"), self.signed, self.signature, *self.parts))

    @property
    def digest(self) -> bytes:
        """Stands for the whole message, parts included."""
        return sha256(self.signed).digest()


def blank(frame: Frame, parameters: Parameters) -> tuple[memoryview, list[memoryview]]:
    """The bytes of a message whose header is known and whose parts are not, and those parts, to be filled there."""
    lengths = frame.header.message.lengths(parameters)
    front = frame.encode()
    start = len(front)
    data = prefer_huge_pages(torch.empty(start + sum(lengths), dtype=torch.uint8)).numpy().data
    data[:start] = front
    parts = []
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return data, parts


def write(
    message: Message,
    parts: Sequence[Part],
    *,
    parameters: Parameters,
    identity: Identity,
    number: int,
    sender: int,
    recipient: int | None,
    digests: Sequence[bytes] | None = None,
) -> Frame:
    """Sign a message. `digests` saves hashing parts whose SHA-256 is known."""
    if digests is None:
        digests = digests_of(parts)
    header = Header(number=number, sender=sender, recipient=recipient, message=message, digests=tuple(digests))
    signed = header.encode(parameters)
    return Frame(header=header, signature=identity.sign(signed), parts=tuple(parts), signed=signed)


def read(data: Part, parameters: Parameters) -> Frame:
    """Take a message apart; neither its signature nor its digests are looked at. Raises Malformed."""
    view = memoryview(data).cast("B")
    if len(view) < 4:
        raise Malformed("it is shorter than the length of a header")
    end = 4 + int.from_bytes(view[:4], "little")
    if end > min(len(view), 4 + most_header_bytes(parameters)):
        raise Malformed(f"its header of {end - 4} bytes is longer than the message or than allowed")
    signed = bytes(view[4:end])
    header = Header.decode(signed, parameters)
    lengths = header.message.lengths(parameters)
    position = end + SIGNATURE
    if len(view) != position + sum(lengths):
        raise Malformed(f"it has {len(view)} bytes and should have {position + sum(lengths)}")
    parts = []
    for length in lengths:
        parts.append(view[position : position + length])
        position += length
    return Frame(header=header, signature=bytes(view[end : end + SIGNATURE]), parts=tuple(parts), signed=signed)


def receive(data: Part, parameters: Parameters, *, recipient: int, senders: range) -> Frame:
    """Read a message to `recipient`, and make sure that it comes from one of `senders` and is what was signed.

    Raises ProtocolError, which names the sender only once its signature was good.
    """
    try:
        frame = read(data, parameters)
    except Malformed as error:
        raise ProtocolError("unknown sender", f"malformed message: {error}") from error
    header = frame.header
    if header.sender not in senders or header.recipient not in (None, recipient):
        to = "everybody" if header.recipient is None else name(header.recipient, parameters)
        raise ProtocolError("unknown sender", f"a message from {name(header.sender, parameters)} to {to}, not for here")
    if not is_signed(frame.signed, frame.signature, public_key(header.sender, parameters)):
        raise ProtocolError("unknown sender", f"not signed by {name(header.sender, parameters)}")
    vouched = header.message.vouched()
    own = [k for k in range(len(frame.parts)) if k not in vouched]
    if digests_of([frame.parts[k] for k in own]) != [header.digests[k] for k in own]:
        raise ProtocolError(name(header.sender, parameters), "a part differs from its digest")
    return frame


def digests_of(parts: Sequence[Part]) -> list[bytes]:
    """SHA-256 of each."""
    return each(lambda part: sha256(part).digest(), parts, max(map(len, parts), default=0))


def public_key(index: int, parameters: Parameters) -> bytes:
    """Of a client or, for N, of the server."""
    return (*parameters.identities, parameters.server)[index]


def name(index: int, parameters: Parameters) -> str:
    """For people: "client 3" or "server"."""
    return "server" if index == parameters.clients else f"client {index}"


def most_header_bytes(parameters: Parameters) -> int:
    """No header is longer: the largest carries those of N owners, which have N digests each."""
    N = parameters.clients
    return 4096 + N * (1024 + 40 * (N + 2))


def to_bytes(elements: Tensor) -> memoryview:
    """Elements of a field as little-endian bytes; a view where memory is little-endian."""
    array = elements.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B")


def to_elements(data: Part, field: Field, out: Tensor | None = None) -> Tensor | None:
    """The bytes of to_bytes as elements [n], written to `out` if given; None if one is not canonical."""
    width = np.dtype(f"<i{field.bytes}")
    found = np.frombuffer(data, dtype=width)
    if not is_canonical(found, field):
        return None
    elements = prefer_huge_pages(torch.empty(len(found), dtype=field.dtype)) if out is None else out
    np.copyto(elements.numpy(), found)
    return elements


def is_canonical(elements: "np.ndarray[Any, Any]", field: Field) -> bool:
    """Whether all are in 0 … p - 1: the largest of them as unsigned numbers. Leaves torch's threads alone."""
    order = elements.dtype.byteorder
    return bool(elements.view(f"{order}u{field.bytes}").max(initial=0) < field.p)
