"""What makes a client believe a sum: signatures (V0), a linear MAC (V1), coded projections (V2).

V2. After the server has named its sum Y and the digests of the clients' coded sums a_j, rho follows from the digest of
that message, and each client j says b_j = <rho, a_j>. Honest b_j lie on one polynomial, whose values at the points of
the data are <rho, Y_k> if Y is right. n letters of which e are declared wrong and E may lie leave n - e - E >= K + T
honest ones, which determine that polynomial; a wrong Y agrees with it with probability at most 2^-100.

In mask mode the a_j are sums of shares of masks, and Y_k = sum_i w_i M_ik - mask_k, M_i the masked vector of owner i.
The owners say <rho, M_ik>; of owners who fell silent, M_i itself is shown, as they committed to it.
"""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import is_signed
from anabranch.aggregate.secure.outcome import View, correctable
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.proof import challenge, consistent, digest_of, mac, mac_key, mac_mask, project
from anabranch.aggregate.secure.threads import each
from anabranch.aggregate.secure.wire import Frame, Header, Part, name, to_bytes, to_elements
from anabranch_kernels.field_coding.op import matrix_of, multiply
from anabranch_kernels.memory import prefer_huge_pages

AS_LONG_AS = 160_000  # bytes are hashed in the time that a signature takes to verify


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sum that the server claims: blocks [K, L], and the message that says so."""

    parameters: Parameters
    blocks: Tensor
    tag: Tensor | None  # [copies], for V1
    result: m.Result
    digest: bytes  # of the message

    @cached_property
    def rho(self) -> Tensor:
        """[copies, L], by the digest."""
        return challenge(digest_of("sum", self.digest), self.parameters)

    def project(self, rows: Tensor) -> Tensor:
        """Of rows [M, L], for V2: [M, copies]."""
        return project(rows, self.rho, self.parameters)


def said(
    message: m.Message, parts: tuple[Part, ...], signature: bytes, client: int, number: int, parameters: Parameters
) -> bool:
    """Whether this client signed this message to the server."""
    return said_with(message, tuple(sha256(part).digest() for part in parts), signature, client, number, parameters)


def first_unsaid(
    claims: Sequence[tuple[int, m.Message, tuple[Part, ...], bytes]], number: int, parameters: Parameters
) -> int | None:
    """The first client of (client, message, parts, signature) that did not sign its message to the server."""

    def is_said(one: tuple[int, m.Message, tuple[Part, ...], bytes]) -> bool:
        client, message, parts, signature = one
        return said(message, parts, signature, client, number, parameters)

    good = each(is_said, claims, AS_LONG_AS)
    return next((claims[k][0] for k, one in enumerate(good) if not one), None)


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
    K, L, field = parameters.blocks, parameters.share_length, parameters.field
    blocks = prefer_huge_pages(torch.empty(K, L, dtype=field.dtype))
    good = all(to_elements(part, field, out=row) is not None for part, row in zip(frame.parts, blocks, strict=False))
    tag = to_elements(frame.parts[K], field) if parameters.proof == "V1" else None
    if not good or (parameters.proof == "V1" and tag is None):
        raise ProtocolError("server", "its result has elements that are not canonical")
    return Claim(parameters=parameters, blocks=blocks, tag=tag, result=result, digest=frame.digest)


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
    late = _late(view, proof, parts[2:], held, parameters) if proof.late else None
    check_fit(claim, view, proof, parts, late, parameters)


def _check_speakers(claim: Claim, view: View, proof: m.Proof, parts: tuple[Part, ...], parameters: Parameters) -> None:
    p, K = parameters, parameters.blocks
    if set(proof.members) & set(view.suspects):
        raise ProtocolError("server", "its proof uses projections of suspects")
    check_wrong(proof.members, proof.wrong, p)
    size = m.scalars_bytes(p)
    words, masked = memoryview(parts[0]), memoryview(parts[1])
    claims: list[tuple[int, m.Message, tuple[Part, ...], bytes]] = []
    for row, (client, signature) in enumerate(zip(proof.members, proof.signatures, strict=True)):
        own: tuple[Part, ...] = (words[row * size : (row + 1) * size],)
        if client in proof.masked:
            k = proof.masked.index(client)
            own = (*own, masked[k * K * size : (k + 1) * K * size])
        claims.append((client, m.Projection(claim.digest, len(own) - 1), own, signature))
    if (liar := first_unsaid(claims, view.number, p)) is not None:
        raise ProtocolError("server", f"{name(liar, p)} did not sign the projection shown")


def check_fit(
    claim: Claim, view: View, proof: m.Proof, parts: Sequence[Part], late: Tensor | None, parameters: Parameters
) -> None:
    """V2 without the signatures, for who has checked them before.

    late   [K, L], weighted sum of the masked vectors of owners who fell silent
    """
    p = parameters
    letters, of_masked = to_elements(parts[0], p.field), to_elements(parts[1], p.field)
    if letters is None or of_masked is None:
        raise ProtocolError("server", "its proof has elements that are not canonical")
    kept = [row for row, client in enumerate(proof.members) if client not in proof.wrong]
    values = consistent(p.code, [proof.members[row] for row in kept], letters.view(-1, p.copies)[kept])
    if values is None:
        raise ProtocolError("server", "the projections of the clients' sums do not fit together")
    if p.mode == "mask":
        if sorted((*proof.masked, *proof.late)) != list(view.accepted):
            raise ProtocolError("server", "its proof does not speak of the masked vectors of the set")
        weight_of = dict(zip(view.accepted, view.weights, strict=True))
        weights = [*(weight_of[owner] for owner in proof.masked), p.field.p - 1]
        rows = [of_masked.view(len(proof.masked), -1), values.reshape(1, -1)]
        if late is not None:
            weights.append(1)
            rows.append(claim.project(late).reshape(1, -1))
        values = multiply(matrix_of([weights], p.field, values.device), torch.cat(rows), p.field).view(values.shape)
    if not torch.equal(claim.project(claim.blocks), values):
        raise ProtocolError("server", "its sum is wrong: the clients' projections say otherwise")


def _late(
    view: View, proof: m.Proof, vectors: Sequence[Part], held: Mapping[int, Frame], parameters: Parameters
) -> Tensor:
    """Weighted sum [K, L] of the masked vectors that are shown because their owners fell silent."""
    p = parameters
    weight_of = dict(zip(view.accepted, view.weights, strict=True))
    for owner in proof.late:
        if owner not in held:
            raise ProtocolError("server", f"this client never saw the Shares of {name(owner, p)}")
        if owner not in weight_of:
            raise ProtocolError("server", "its proof does not speak of the masked vectors of the set")
    rows = prefer_huge_pages(torch.empty(len(vectors), p.blocks * p.share_length, dtype=p.field.dtype))

    def is_own(k: int) -> bool:
        header = held[proof.late[k]].header
        assert isinstance(header.message, m.Shares)
        committed = header.digests[len(header.message.recipients)]
        return committed == sha256(vectors[k]).digest() and to_elements(vectors[k], p.field, out=rows[k]) is not None

    for owner, good in zip(proof.late, each(is_own, range(len(vectors)), m.vector_bytes(p)), strict=True):
        if not good:
            raise ProtocolError("server", f"the masked vector is not the one of {name(owner, p)}")
    weights = matrix_of([[weight_of[owner] for owner in proof.late]], p.field, rows.device)
    return multiply(weights, rows, p.field).view(p.blocks, p.share_length)
