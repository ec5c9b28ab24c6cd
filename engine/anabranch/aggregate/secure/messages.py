"""What is said, in order. Bodies are lists of bytes, integers, texts and such lists, each checked on the way in.

    before the first round   Hello  ->   Roster        session keys
    before a round, if       Commit ->   Commits       hashes of logits are fixed
      logits are filtered    Reveal ->   Reveals       and then told
    each round               Shares ->   Delivery      shares, sealed for their recipients
                             Check  ->   Proposal      whose vectors are shared consistently and go into the sum
                             Agreement -> Quorum       all have seen the same set
                             Sum    ->   Result        coded sums, decoded
                             Projection -> Proof       the sum is right (V2)

Left: clients to the server. Right: the server to clients.
"""

from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, Self

from anabranch.aggregate.secure.errors import cbor
from anabranch.aggregate.secure.keys import sealed_length
from anabranch.aggregate.secure.parameters import Parameters

MOST_REASON = 200  # characters
MOST_HASH = 1000  # bytes of a hash of logits
SALT = 32  # bytes that hide a share behind its digest, however short it is


class Malformed(ValueError):
    """Bytes that are no message."""


def integer(value: Any, most: int) -> int:
    """An integer of 0 … most."""
    if type(value) is not int or not 0 <= value <= most:
        raise Malformed(f"needs an integer of 0 to {most}")
    return value


def octets(value: Any, length: int) -> bytes:
    """So many bytes."""
    if type(value) is not bytes or len(value) != length:
        raise Malformed(f"needs {length} bytes")
    return value


def items(value: Any, most: int) -> list[Any]:
    """A list, not too long."""
    if type(value) is not list or len(value) > most:
        raise Malformed(f"needs a list of at most {most}")
    return value


def clients(value: Any, parameters: Parameters) -> tuple[int, ...]:
    """Different clients in rising order."""
    found = tuple(integer(one, parameters.clients - 1) for one in items(value, parameters.clients))
    if list(found) != sorted(set(found)):
        raise Malformed("needs different clients in rising order")
    return found


def all_octets(value: Any, length: int, count: int) -> tuple[bytes, ...]:
    """As many byte strings."""
    if len(items(value, count)) != count:
        raise Malformed(f"needs a list of {count}")
    return tuple(octets(one, length) for one in value)


def reasons(value: Any, parameters: Parameters) -> tuple[tuple[int, str], ...]:
    """Pairs of a client and what is wrong with it."""
    pairs = [items(one, 2) for one in items(value, parameters.clients)]
    if any(len(one) != 2 or type(one[1]) is not str or len(one[1]) > MOST_REASON for one in pairs):
        raise Malformed("needs pairs of a client and a reason")
    clients([one[0] for one in pairs], parameters)
    return tuple((one[0], one[1]) for one in pairs)


@dataclass(frozen=True, slots=True)
class Message:
    """A body, and how many bytes each part behind it has."""

    @classmethod
    def of(cls, body: Any, parameters: Parameters) -> Self:
        """The message of a body; raises Malformed."""
        if len(items(body, 8)) != len(fields(cls)):
            raise Malformed(f"{cls.__name__} needs {len(fields(cls))} fields")
        return cls.checked(parameters, *body)

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        """The message of these fields, each made sure of."""
        raise AssertionError(f"{cls.__name__} does not say what it consists of")

    def body(self) -> list[Any]:
        """What `of` takes."""
        return [getattr(self, field.name) for field in fields(self)]

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        """Bytes of each part."""
        return ()

    def vouched(self) -> range:
        """The parts whose digest in the header is one that their first sender committed to: the recipient compares.

        All others have the SHA-256 of their bytes there.
        """
        return range(0)


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """A client's X25519 key for this session."""

    public: bytes

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        (public,) = values
        return cls(octets(public, 32))


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """The session keys of all clients that said hello, with the signatures of their Hellos."""

    members: tuple[int, ...]
    publics: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        members, publics, signatures = values
        found = clients(members, parameters)
        return cls(found, all_octets(publics, 32, len(found)), all_octets(signatures, 64, len(found)))


@dataclass(frozen=True, slots=True)
class Shares(Message):
    """An owner's vector. Parts: a sealed share for each recipient; in mask mode the masked vector; for V1 its tag.

    The digest of a sealed share is that of its plaintext, which ends with a salt: what was decrypted, under whatever
    key, is then what was committed to.
    """

    recipients: tuple[int, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        (recipients,) = values
        return cls(clients(recipients, parameters))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        shares = (sealed_share_bytes(parameters),) * len(self.recipients)
        masked = (vector_bytes(parameters),) if parameters.mode == "mask" else ()
        tag = (scalars_bytes(parameters),) if parameters.proof == "V1" else ()
        return (*shares, *masked, *tag)

    def vouched(self) -> range:
        return range(len(self.recipients))


@dataclass(frozen=True, slots=True)
class Delivery(Message):
    """To one client: the header of each owner's Shares, under which alone its share opens. Parts: these shares."""

    owners: tuple[int, ...]
    headers: tuple[bytes, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        owners, headers = values
        found = clients(owners, parameters)
        if len(items(headers, len(found))) != len(found) or any(type(one) is not bytes for one in headers):
            raise Malformed("needs the header of each owner")
        return cls(found, tuple(headers))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        return (sealed_share_bytes(parameters),) * len(self.owners)

    def vouched(self) -> range:
        return range(len(self.owners))


@dataclass(frozen=True, slots=True)
class Check(Message):
    """Whose shares a client has, and why not the others'. Part: its masked projections of each, [owners, copies]."""

    owners: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        owners, refused = values
        return cls(clients(owners, parameters), reasons(refused, parameters))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        return (len(self.owners) * scalars_bytes(parameters),)


@dataclass(frozen=True, slots=True)
class Proposal(Message):
    """Whose vectors are to be summed, by the digests of their Shares; whose word no longer counts; who is left out."""

    accepted: tuple[int, ...]
    commitments: tuple[bytes, ...]
    suspects: tuple[int, ...]
    excluded: tuple[tuple[int, str], ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        accepted, commitments, suspects, excluded = values
        found = clients(accepted, parameters)
        left_out = reasons(excluded, parameters)
        return cls(found, all_octets(commitments, 32, len(found)), clients(suspects, parameters), left_out)


@dataclass(frozen=True, slots=True)
class Agreement(Message):
    """The set that a client has seen; it signs one in a round."""

    view: bytes

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        (view,) = values
        return cls(octets(view, 32))


@dataclass(frozen=True, slots=True)
class Quorum(Message):
    """The signatures of the Agreements."""

    signers: tuple[int, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        signers, signatures = values
        found = clients(signers, parameters)
        return cls(found, all_octets(signatures, 64, len(found)))


@dataclass(frozen=True, slots=True)
class Sum(Message):
    """Part: a client's weighted sum of the shares it has, [L]."""

    view: bytes

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        (view,) = values
        return cls(octets(view, 32))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        return (parameters.share_length * parameters.field.bytes,)


@dataclass(frozen=True, slots=True)
class Result(Message):
    """The sum of the vectors and what it was decoded from. Parts: K blocks [L] of it; for V1 the sum of the tags."""

    view: bytes
    members: tuple[int, ...]
    sums: tuple[bytes, ...]
    signatures: tuple[bytes, ...]
    wrong: tuple[int, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        view, members, sums, signatures, wrong = values
        found = clients(members, parameters)
        digests, signed = all_octets(sums, 32, len(found)), all_octets(signatures, 64, len(found))
        return cls(octets(view, 32), found, digests, signed, clients(wrong, parameters))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        tag = (scalars_bytes(parameters),) if parameters.proof == "V1" else ()
        return (*(parameters.share_length * parameters.field.bytes,) * parameters.blocks, *tag)


@dataclass(frozen=True, slots=True)
class Projection(Message):
    """Parts: projections of a client's Sum, [copies]; from an owner in mask mode also of its masked vector."""

    result: bytes
    masked: int

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        result, masked = values
        return cls(octets(result, 32), integer(masked, int(parameters.mode == "mask")))

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        scalars = scalars_bytes(parameters)
        return (scalars, parameters.blocks * scalars) if self.masked else (scalars,)


@dataclass(frozen=True, slots=True)
class Proof(Message):
    """The Projections. Parts: those of Sums; those of masked vectors; the masked vectors of owners who fell silent."""

    members: tuple[int, ...]
    signatures: tuple[bytes, ...]
    wrong: tuple[int, ...]
    masked: tuple[int, ...]
    late: tuple[int, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        members, signatures, wrong, masked, late = (values[0], values[1], *(clients(v, parameters) for v in values[2:]))
        found = clients(members, parameters)
        if not set(masked) <= set(found) or (parameters.mode == "direct" and (masked or late)):
            raise Malformed("has projections of masked vectors that cannot be")
        return cls(found, all_octets(signatures, 64, len(found)), wrong, masked, late)

    def lengths(self, parameters: Parameters) -> tuple[int, ...]:
        scalars, vectors = scalars_bytes(parameters), (vector_bytes(parameters),) * len(self.late)
        return (len(self.members) * scalars, len(self.masked) * parameters.blocks * scalars, *vectors)

    def vouched(self) -> range:
        return range(2, 2 + len(self.late))


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """A client's commitment to the hash of its logits; see filter_phase."""

    commitment: bytes

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        (commitment,) = values
        return cls(octets(commitment, 32))


@dataclass(frozen=True, slots=True)
class Commits(Message):
    """All commitments, with the signatures of the Commits."""

    members: tuple[int, ...]
    commitments: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        members, commitments, signatures = values
        found = clients(members, parameters)
        return cls(found, all_octets(commitments, 32, len(found)), all_octets(signatures, 64, len(found)))

    @property
    def digest(self) -> bytes:
        """What a Reveal names them by."""
        plain = [list(self.members), list(self.commitments), list(self.signatures)]
        return sha256(cbor().dumps(plain, canonical=True)).digest()


@dataclass(frozen=True, slots=True)
class Reveal(Message):
    """What a client committed to, and the digest of the Commits that it has seen."""

    commits: bytes
    nonce: bytes
    bits: bytes

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        commits, nonce, bits = values
        return cls(octets(commits, 32), octets(nonce, 32), hash_octets(bits))


@dataclass(frozen=True, slots=True)
class Reveals(Message):
    """What was committed to, with the signatures of the Reveals."""

    members: tuple[int, ...]
    commits: tuple[bytes, ...]
    nonces: tuple[bytes, ...]
    bits: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def checked(cls, parameters: Parameters, *values: Any) -> Self:
        members, commits, nonces, bits, signatures = values
        found = clients(members, parameters)
        n = len(found)
        if len(items(bits, n)) != n:
            raise Malformed(f"needs a list of {n}")
        hashes = tuple(hash_octets(one) for one in bits)
        return cls(found, all_octets(commits, 32, n), all_octets(nonces, 32, n), hashes, all_octets(signatures, 64, n))


def hash_octets(value: Any) -> bytes:
    """The bytes of a hash, of which filter_phase knows how many they must be."""
    if type(value) is not bytes or len(value) > MOST_HASH:
        raise Malformed(f"needs at most {MOST_HASH} bytes")
    return value


KINDS: tuple[type[Message], ...] = (
    Hello, Roster, Shares, Delivery, Check, Proposal, Agreement, Quorum, Sum, Result, Projection, Proof,
    Commit, Commits, Reveal, Reveals,
)  # fmt: skip


def share_bytes(parameters: Parameters) -> int:
    """Of a share: L elements, one of each mask of the owner's check, and a salt."""
    return (parameters.share_length + parameters.copies) * parameters.field.bytes + SALT


def sealed_share_bytes(parameters: Parameters) -> int:
    """Of a share's ciphertext."""
    return sealed_length(share_bytes(parameters))


def scalars_bytes(parameters: Parameters) -> int:
    """Of one element for each copy of a check."""
    return parameters.copies * parameters.field.bytes


def vector_bytes(parameters: Parameters) -> int:
    """Of K blocks of L elements."""
    return parameters.blocks * parameters.share_length * parameters.field.bytes
