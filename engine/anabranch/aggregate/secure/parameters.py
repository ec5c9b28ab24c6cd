"""What all parties of a session agree on before it starts; its digest is in every message."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, get_args

from anabranch.aggregate.secure.errors import cbor
from anabranch_kernels.field_coding.op import BABYBEAR, FIELDS, Code, Field, FixedPoint

VERSION = 2
MOST_ELEMENTS = 1 << 31  # of a vector
SOUNDNESS_BITS = 100  # a random check passes for a wrong value with a probability of at most 2^-100

Mode = Literal["direct", "mask"]
Proof = Literal["V0", "V1", "V2"]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One session of N clients and a server, for any number of rounds.

    session      16 to 64 bytes that were never used before
    identities   Ed25519 public key of each client, 32 bytes; client i is the i-th
    server       Ed25519 public key of the server
    length       l, numbers in a vector
    fixed_point  how real numbers become integers; the sum of all weights times its largest integer must fit the field
    blocks       K: a share has l / K elements
    privacy      T: the server and any T clients together learn no more than the sum
    errors       E: so many clients may send anything
    dropouts     D: so many clients may fall silent, at any step
    weights      of each client in the sum; None for ones. A filter may lower them
    mode         "direct": the vector itself is coded and shared; "mask": a random mask is, and the masked vector goes
                 to the server, which is one vector more to send
    proof        what clients check before they accept a sum. "V0": that K + T clients signed their part; "V1": a linear
                 MAC under a key that the server lacks, sound while it colludes with no client; "V2": coded projections,
                 sound against a lying server with E clients

    Raises ValueError for thresholds that cannot hold and for weights that could overflow.
    """

    session: bytes
    identities: tuple[bytes, ...]
    server: bytes
    length: int
    fixed_point: FixedPoint
    blocks: int
    privacy: int
    errors: int = 0
    dropouts: int = 0
    weights: tuple[int, ...] | None = None
    field: Field = BABYBEAR
    mode: Mode = "direct"
    proof: Proof = "V2"

    def __post_init__(self) -> None:
        if not 16 <= len(self.session) <= 64:
            raise ValueError(f"session must be 16 to 64 bytes, got {len(self.session)}")
        keys = (*self.identities, self.server)
        if any(len(key) != 32 for key in keys) or len(set(keys)) != len(keys):
            raise ValueError("identities and server must be different Ed25519 public keys of 32 bytes")
        if self.field != FIELDS.get(self.field.name):
            raise ValueError(f"unknown field {self.field.name!r}; choose one of {sorted(FIELDS)}")
        if self.mode not in get_args(Mode) or self.proof not in get_args(Proof):
            raise ValueError(
                f"mode must be one of {get_args(Mode)} and proof one of {get_args(Proof)}, "
                f"got {self.mode!r} and {self.proof!r}"
            )
        if not 1 <= self.length <= MOST_ELEMENTS:
            raise ValueError(f"length must be 1 to {MOST_ELEMENTS}, got {self.length}")
        self._check_thresholds()
        if len(self.all_weights) != self.clients or min(self.all_weights) < 1:
            raise ValueError(f"weights must be {self.clients} integers from 1 on, got {self.weights}")
        self.fixed_point.check_budget(self.field, sum(self.all_weights))

    def _check_thresholds(self) -> None:
        N, K, T, E, D = self.clients, self.blocks, self.privacy, self.errors, self.dropouts
        sizes = f"N={N}, K={K}, T={T}, E={E}, D={D}"
        if min(K, T) < 1 or min(E, D) < 0:
            raise ValueError(f"need K, T >= 1 and E, D >= 0, got {sizes}")
        if N - D < K + T + 2 * E:
            raise ValueError(f"need N - D >= K + T + 2E to correct E wrong shares, got {sizes}")
        if self.quorum > N - D:
            raise ValueError(f"need N - D >= {self.quorum}, more than (N + T + E) / 2, to agree on a set, got {sizes}")
        if self.least_owners > N - D:
            raise ValueError(f"need N - D >= T + 2 vectors in a sum, got {sizes}")

    @property
    def clients(self) -> int:
        """N."""
        return len(self.identities)

    @property
    def all_weights(self) -> tuple[int, ...]:
        """One for each client."""
        return (1,) * self.clients if self.weights is None else self.weights

    @property
    def quorum(self) -> int:
        """Signatures that fix the set of owners: two sets cannot both have so many while T + E clients lie."""
        return (self.clients + self.privacy + self.errors) // 2 + 1

    @property
    def least_owners(self) -> int:
        """In a sum: with T of them colluding, two others must remain."""
        return self.privacy + 2

    @property
    def share_length(self) -> int:
        """L = ceil(l / K)."""
        return -(-self.length // self.blocks)

    @property
    def copies(self) -> int:
        """Independent projections that make a check as sound as SOUNDNESS_BITS say: 4 for fields of 31 bits."""
        return -(-SOUNDNESS_BITS // (self.field.bits - 2))  # each of a tensor fails with 2 / 2^(bits - 1)

    @cached_property
    def code(self) -> Code:
        return Code(field=self.field, clients=self.clients, blocks=self.blocks, privacy=self.privacy)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical CBOR of all of this."""
        return sha256(self.encode()).digest()

    def encode(self) -> bytes:
        """Canonical CBOR, for parties that are told the parameters instead of knowing them."""
        encoded: bytes = cbor().dumps(self._plain(), canonical=True)
        return encoded

    @staticmethod
    def decode(data: bytes) -> "Parameters":
        """The parameters that were encoded; raises ValueError for bytes that are not what `encode` makes of some."""
        try:
            plain = cbor().loads(data, max_depth=4, allow_indefinite=False)
            fixed_point = FixedPoint(clip=plain["clip"], fraction_bits=plain["fraction_bits"])
            same = ("session", "server", "length", "blocks", "privacy", "errors", "dropouts", "mode", "proof")
            others: dict[str, Any] = {name: plain[name] for name in same}
            others |= {name: tuple(plain[name]) for name in ("identities", "weights")}
            found = Parameters(fixed_point=fixed_point, field=FIELDS[plain["field"]], **others)
            kinds = {type(x) for x in (found.session, found.server, *found.identities)}
            counts = (found.length, found.blocks, found.privacy, found.errors, found.dropouts, *found.all_weights)
            if found.encode() != data or kinds != {bytes} or {type(x) for x in counts} != {int}:
                raise ValueError("they are not canonical")
        except Exception as error:  # whatever types stand where others belong, it is the sender's fault
            raise ValueError(f"these bytes are no parameters: {error}") from error
        return found

    def _plain(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "session": self.session,
            "identities": list(self.identities),
            "server": self.server,
            "length": self.length,
            "clip": self.fixed_point.clip,
            "fraction_bits": self.fixed_point.fraction_bits,
            "blocks": self.blocks,
            "privacy": self.privacy,
            "errors": self.errors,
            "dropouts": self.dropouts,
            "weights": list(self.all_weights),
            "field": self.field.name,
            "p": self.field.p,
            "mode": self.mode,
            "proof": self.proof,
        }
