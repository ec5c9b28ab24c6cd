"""What makes a client believe a sum: signatures (V0), a linear MAC (V1), coded projections (V2).

V2. After the server has named its sum Y and the digests of the clients' coded sums a_j, rho follows from the digest of
that message, and each client j says b_j = <rho, a_j>. Honest b_j lie on one polynomial, whose values at the points of
the data are <rho, Y_k> if Y is right. n letters of which e are declared wrong and E may lie leave n - e - E >= K + T
honest ones, which determine that polynomial; a wrong Y agrees with it with probability at most 2^-100.

In mask mode the a_j are sums of shares of masks, and Y_k = sum_i w_i M_ik - mask_k, M_i the masked vector of owner i.
The owners say <rho, M_ik>; of owners who fell silent, M_i itself is shown, as they committed to it.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import is_signed
from anabranch.aggregate.secure.outcome import View, correctable
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.proof import consistent, digest_of, mac, mac_key, mac_mask, project
from anabranch.aggregate.secure.wire import Frame, Header, Part, name, to_bytes, to_elements
from anabranch_kernels.field_coding.op import matrix_of, multiply


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sum that the server claims: blocks [K, L], and the message that says so."""

    blocks: Tensor
    tag: Tensor | None  # [copies], for V1
    result: m.Result
    digest: bytes  # of the message

    @property
    def seed(self) -> bytes:
        """Of rho."""
        return digest_of("sum", self.digest)


def said(
    message: m.Message, parts: tuple[Part, ...], signature: bytes, client: int, number: int, parameters: Parameters
) -> bool:
    """Whether this client signed this message to the server."""
    return said_with(message, tuple(sha256(part).digest() for part in parts), signature, client, number, parameters)


def said_with(
    message: m.Message, digests: tuple[bytes, ...], signature: bytes, client: int, number: int, parameters: Parameters
) -> bool:
    """The same, for parts of which the digests are known."""
    header = Header(number=number, sender=client, recipient=parameters.clients, message=message, digests=digests)
    return is_signed(header.encode(parameters), signature, parameters.identities[client])


def claim_of(result: m.Result, frame: Frame, view: View, parameters: Parameters, index: int, own: Part | None) -> Claim:
    """The sum in a Result, if it could be right; `own` is what client `index` sent as its Sum."""
    if result.view != view.digest:
        raise ProtocolError("server", "its result is of another set of vectors")
    if set(result.members) & set(view.suspects):
        raise ProtocolError("server", "its result uses sums of suspects")
    check_wrong(result.members, result.wrong, parameters)
    if own is not None and index in result.members:
        digest = result.sums[result.members.index(index)]
        if not hmac.compare_digest(digest, sha256(own).digest()):
            raise ProtocolError("server", f"did not use the sum that {name(index, parameters)} sent")
    blocks = to_elements(frame.parts[0], parameters.field)
    tag = to_elements(frame.parts[1], parameters.field) if parameters.proof == "V1" else None
    if blocks is None or (parameters.proof == "V1" and tag is None):
        raise ProtocolError("server", "its result has elements that are not canonical")
    blocks = blocks.view(parameters.blocks, parameters.share_length)
    return Claim(blocks=blocks, tag=tag, result=result, digest=frame.digest)


def check_wrong(members: tuple[int, ...], wrong: tuple[int, ...], parameters: Parameters) -> None:
    """Raises ProtocolError unless the letters of `members` without those of `wrong` are enough to be sure."""
    if not set(wrong) <= set(members) or len(wrong) > correctable(members, parameters):
        raise ProtocolError(
            "server", f"calls {len(wrong)} of {len(members)} answers wrong; too many to be sure of the sum"
        )


def check_signatures(claim: Claim, view: View, parameters: Parameters) -> None:
    """V0: the clients named did send sums for this set."""
    result = claim.result
    for client, digest, signature in zip(result.members, result.sums, result.signatures, strict=True):
        if not said_with(m.Sum(view.digest), (digest,), signature, client, view.number, parameters):
            raise ProtocolError("server", f"{name(client, parameters)} did not sign the sum shown")


def check_tags(claim: Claim, view: View, parameters: Parameters, group_key: bytes) -> None:
    """V1: the sum of the owners' tags is the tag of the sum."""
    masks = torch.stack([mac_mask(group_key, view.number, owner, parameters) for owner in view.accepted])
    weights = matrix_of([list(view.weights)], parameters.field, masks.device)
    mask = multiply(weights, masks, parameters.field)[0]
    expected = mac(mac_key(group_key, view.number, parameters), claim.blocks, mask, parameters)
    assert claim.tag is not None
    if not hmac.compare_digest(to_bytes(expected), to_bytes(claim.tag)):
        raise ProtocolError("server", "the tag of its sum is wrong: so is the sum")


def check_projections(
    claim: Claim, view: View, proof: m.Proof, parts: tuple[Part, ...], held: Mapping[int, Frame], parameters: Parameters
) -> None:
    """V2: the clients' projections are theirs, fit together, and fit the sum."""
    _check_speakers(claim, view, proof, parts, parameters)
    check_fit(claim, view, proof, parts, held, parameters)


def _check_speakers(claim: Claim, view: View, proof: m.Proof, parts: tuple[Part, ...], parameters: Parameters) -> None:
    p, K = parameters, parameters.blocks
    if set(proof.members) & set(view.suspects):
        raise ProtocolError("server", "its proof uses projections of suspects")
    check_wrong(proof.members, proof.wrong, p)
    size = m.scalars_bytes(p)
    words, masked = memoryview(parts[0]), memoryview(parts[1])
    for row, (client, signature) in enumerate(zip(proof.members, proof.signatures, strict=True)):
        own: tuple[Part, ...] = (words[row * size : (row + 1) * size],)
        if client in proof.masked:
            k = proof.masked.index(client)
            own = (*own, masked[k * K * size : (k + 1) * K * size])
        if not said(m.Projection(claim.digest, len(own) - 1), own, signature, client, view.number, p):
            raise ProtocolError("server", f"{name(client, p)} did not sign the projection shown")


def check_fit(
    claim: Claim, view: View, proof: m.Proof, parts: tuple[Part, ...], held: Mapping[int, Frame], parameters: Parameters
) -> None:
    """V2 without the signatures, for who has checked them before."""
    p = parameters
    K, C = p.blocks, p.copies
    words, masked = memoryview(parts[0]), memoryview(parts[1])
    letters, of_masked = to_elements(words, p.field), to_elements(masked, p.field)
    if letters is None or of_masked is None:
        raise ProtocolError("server", "its proof has elements that are not canonical")
    kept = [row for row, client in enumerate(proof.members) if client not in proof.wrong]
    values = consistent(p.code, [proof.members[row] for row in kept], letters.view(-1, C)[kept])
    if values is None:
        raise ProtocolError("server", "the projections of the clients' sums do not fit together")
    if p.mode == "mask":
        rows = dict(zip(proof.masked, of_masked.view(-1, K * C), strict=True))
        rows |= _late(claim, proof, parts[2:], held, p)
        if set(rows) != set(view.accepted):
            raise ProtocolError("server", "its proof does not speak of the masked vectors of the set")
        weights = matrix_of([[*view.weights, p.field.p - 1]], p.field, letters.device)
        stacked = torch.stack([*(rows[owner] for owner in view.accepted), values.reshape(-1)])
        values = multiply(weights, stacked, p.field).view(K, C)
    if not torch.equal(project(claim.blocks, claim.seed, p), values):
        raise ProtocolError("server", "its sum is wrong: the clients' projections say otherwise")


def _late(
    claim: Claim, proof: m.Proof, vectors: tuple[Part, ...], held: Mapping[int, Frame], parameters: Parameters
) -> dict[int, Tensor]:
    """Projections [K * copies] of the masked vectors that are shown because their owners fell silent."""
    rows = {}
    for owner, vector in zip(proof.late, vectors, strict=True):
        if owner not in held:
            raise ProtocolError("server", f"this client never saw the Shares of {name(owner, parameters)}")
        header = held[owner].header
        assert isinstance(header.message, m.Shares)
        elements = to_elements(vector, parameters.field)
        if header.digests[len(header.message.recipients)] != sha256(vector).digest() or elements is None:
            raise ProtocolError("server", f"the masked vector is not the one of {name(owner, parameters)}")
        rows[owner] = project(elements.view(parameters.blocks, -1), claim.seed, parameters).reshape(-1)
    return rows
