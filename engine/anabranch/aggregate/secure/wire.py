"""How a message is written: a signed header in canonical CBOR that commits to the parts behind it, then the parts.

    u32 length of the header | header | Ed25519 signature of the header, 64 bytes | parts, one after another
    header = [version, kind, p, parameters' digest, round, sender, recipient, body, [SHA-256 of each part]]

How long each part is follows from the parameters and the body, so nothing in a message can be written in two ways: what
decodes encodes to the same bytes. Parts are views into the bytes received; vectors are little-endian elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from anabranch.aggregate.secure.errors import ProtocolError, cbor
from anabranch.aggregate.secure.keys import Identity, is_signed
from anabranch.aggregate.secure.messages import KINDS, Malformed, Message, all_octets, integer
from anabranch.aggregate.secure.parameters import VERSION, Parameters
from anabranch_kernels.field_coding.op import Field, is_canonical

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


class Draft:
    """A client's message to the server whose parts are filled where they will lie: long parts are not copied."""

    def __init__(self, message: Message, *, parameters: Parameters, number: int, sender: int) -> None:
        lengths = message.lengths(parameters)
        blank = (bytes(32),) * len(lengths)
        self._parameters = parameters
        self._header = Header(
            number=number, sender=sender, recipient=parameters.clients, message=message, digests=blank
        )
        start = 4 + len(self._header.encode(parameters)) + SIGNATURE  # digests do not change the header's length
        self._data = bytearray(start + sum(lengths))
        view = memoryview(self._data)
        self.parts: list[memoryview] = []
        for length in lengths:
            self.parts.append(view[start : start + length])
            start += length

    def sign(self, identity: Identity) -> tuple[Frame, bytearray]:
        """The message without its parts, and all its bytes."""
        digests = tuple(sha256(part).digest() for part in self.parts)
        header = replace(self._header, digests=digests)
        signed = header.encode(self._parameters)
        frame = Frame(header=header, signature=identity.sign(signed), parts=(), signed=signed)
        front = frame.encode()
        self._data[: len(front)] = front
        return frame, self._data


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
        digests = [sha256(part).digest() for part in parts]
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
    for part, digest in zip(frame.parts, header.digests, strict=True):
        if sha256(part).digest() != digest:
            raise ProtocolError(name(header.sender, parameters), "a part differs from its digest")
    return frame


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
    elements = torch.empty(len(data) // field.bytes, dtype=field.dtype) if out is None else out
    np.copyto(elements.numpy(), np.frombuffer(data, dtype=width))
    return elements if is_canonical(elements, field) else None
