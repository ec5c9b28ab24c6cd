"""Random projections that stand for long vectors, words of them that must lie on one polynomial, and linear MACs.

Two vectors that differ have different projections <rho, .> but with probability 2^-(bits - 1) for each random rho, so
`copies` independent ones decide. A word is one projection for each client. Projections are linear: the word of the
clients' sums is itself coded, any K + T of its letters give the projections of the K blocks of the sum, and the others
must agree.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from anabranch.aggregate.secure.keys import KeyStream, derive
from anabranch.aggregate.secure.parameters import Parameters
from anabranch_kernels.field_coding.code import Code, checking_matrix, correct
from anabranch_kernels.field_coding.op import Field, decode, matrix_of, multiply

Letters = Tensor  # [n, C]: C words of the same n clients
FOLD = 32  # a long row is a matrix of so many rows for the owner's check: few, as then its projection is one long pass


def digest_of(label: str, *parts: bytes) -> bytes:
    """SHA-256 under a label of its own; parts have fixed lengths, or are the last."""
    return sha256(b"svafd/" + label.encode() + b"\0" + b"".join(parts)).digest()


def challenge(seed: bytes, parameters: Parameters) -> Tensor:
    """Random rho [copies, L] for projections of blocks and shares, from the seed."""
    C, L = parameters.copies, parameters.share_length
    return KeyStream(seed).challenges(C * L, parameters.field).view(C, L)


def project(rows: Tensor, rho: Tensor, parameters: Parameters) -> Tensor:
    """rows [M, L] times rho [copies, L], each with each: [M, copies]."""
    return multiply(rows, rho.T, parameters.field)


def folded(length: int) -> int:
    """The least multiple of FOLD from `length` on."""
    return -(-length // FOLD) * FOLD


def project_each(rows: Tensor, seeds: Sequence[bytes], parameters: Parameters) -> Tensor:
    """Each row [FOLD * w] of rows [n, FOLD * w] times a rho = r (x) s of its own for each copy: [n, copies].

    r [FOLD] and s [w] come from the row's seed: FOLD + w random elements replace FOLD * w. Two vectors that differ go
    together with probability at most 2 / 2^(bits - 1) (Schwartz and Zippel: the difference is a polynomial of degree
    two in r and s). All n * copies folded rows then meet all r, of which few products are kept: less work than n calls.
    """
    n, w, C, field = len(seeds), rows.shape[1] // FOLD, parameters.copies, parameters.field
    random = [KeyStream(seed).challenges(C * (FOLD + w), field).view(C, FOLD + w) for seed in seeds]
    half = [multiply(row.view(FOLD, w), one[:, FOLD:].T, field) for row, one in zip(rows, random, strict=True)]
    r = torch.stack([one[:, :FOLD] for one in random])
    whole = multiply(r.view(n * C, FOLD), torch.cat(half, 1), field)  # [n * C, n * C]
    return whole.diagonal().reshape(n, C)


def consistent(code: Code, clients: Sequence[int], letters: Letters) -> Tensor | None:
    """The K values [K, C] that words stand for, or None if the letters [n, C] of these n clients do not agree."""
    if not bool(agreeing(code, clients, letters).all()):
        return None
    U = code.threshold
    return decode(letters[:U].contiguous(), clients[:U], code)


def agreeing(code: Code, clients: Sequence[int], letters: Letters) -> Tensor:
    """Which of the C words agree: [C] bool. K + T letters always do."""
    if len(clients) == code.threshold:
        return torch.ones(letters.shape[1], dtype=torch.bool)
    checks = matrix_of(checking_matrix(code, clients), code.field, letters.device)
    return (multiply(checks, letters, code.field) == 0).all(0)


def locate(code: Code, clients: Sequence[int], letters: Letters, errors: int) -> tuple[int, ...] | None:
    """The clients, at most `errors`, without whose letters the words [n, C] agree; None if there are none such.

    n >= K + T + 2 * errors, or ValueError.
    """
    wrong: set[int] = set()
    for _ in range(errors + 1):
        kept = [row for row, client in enumerate(clients) if client not in wrong]
        agree = agreeing(code, [clients[row] for row in kept], letters[kept])
        if bool(agree.all()):
            return tuple(sorted(wrong))
        column = integers(letters[:, int((~agree).nonzero()[0])], code.field)
        word = {clients[row]: column[row] for row in kept}
        found = correct(code, word, most_errors=errors - len(wrong))
        if found is None or not found[1]:
            return None
        wrong |= set(found[1])
    return None


def integers(elements: Tensor, field: Field) -> list[int]:
    """Elements [n] as Python's integers."""
    return [x % 2**64 if x < 0 else x for x in elements.tolist()]


def mac_key(group_key: bytes, number: int, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The key of round `number` for V1: [L, copies] and [K, copies]; <key, X> = sum_k b_k <a, X_k>."""
    K, L, C = parameters.blocks, parameters.share_length, parameters.copies
    stream = KeyStream(derive(group_key, b"svafd/mac/key" + number.to_bytes(4, "big"), parameters.digest))
    elements = stream.elements((K + L) * C, parameters.field)
    return elements[: L * C].view(L, C), elements[L * C :].view(K, C)


def mac_mask(group_key: bytes, number: int, owner: int, parameters: Parameters) -> Tensor:
    """What hides the tag of this owner: [copies], uniform."""
    label = b"svafd/mac/mask" + number.to_bytes(4, "big") + owner.to_bytes(4, "big")
    return KeyStream(derive(group_key, label, parameters.digest)).elements(parameters.copies, parameters.field)


def mac(key: tuple[Tensor, Tensor], blocks: Tensor, mask: Tensor, parameters: Parameters) -> Tensor:
    """The tag of a vector in blocks [K, L]: <key, X> + mask, [copies]. Linear: tags of a sum are the sum of tags."""
    field = parameters.field
    inner = multiply(blocks, key[0], field)  # [K, copies]
    tag = multiply(inner.T.contiguous(), key[1], field).diagonal()
    return multiply(torch.ones(1, 2, dtype=field.dtype), torch.stack([tag, mask]), field)[0]
