"""Random projections that stand for long vectors, words of them that must lie on one polynomial, and linear MACs.

Two vectors that differ have different projections <rho, .> but with probability 1 / p for each random rho, so `copies`
independent ones decide. A word is one projection for each client. Projections are linear: the word of the clients' sums
is itself coded, any K + T of its letters give the projections of the K blocks of the sum, and the others must agree.
"""

from collections.abc import Sequence
from hashlib import sha256
from math import isqrt

import torch
from torch import Tensor

from anabranch.aggregate.secure.keys import KeyStream, derive
from anabranch.aggregate.secure.parameters import Parameters
from anabranch_kernels.field_coding.code import Code, checking_matrix, correct
from anabranch_kernels.field_coding.op import Field, decode, matrix_of, multiply

Letters = Tensor  # [n, C]: C words of the same n clients


def digest_of(label: str, *parts: bytes) -> bytes:
    """SHA-256 under a label of its own; parts have fixed lengths, or are the last."""
    return sha256(b"svafd/" + label.encode() + b"\0" + b"".join(parts)).digest()


def project(rows: Tensor, seed: bytes, parameters: Parameters) -> Tensor:
    """rows [M, L] times uniform rho [L, copies], expanded from the seed: [M, copies]."""
    L, C = rows.shape[1], parameters.copies
    return multiply(rows, KeyStream(seed).elements(L * C, parameters.field).view(L, C), parameters.field)


def square(length: int) -> int:
    """The least w with w * w >= length."""
    return isqrt(length - 1) + 1


def project_square(row: Tensor, seed: bytes, parameters: Parameters) -> Tensor:
    """row [w * w] times rho = r (x) s for each copy, r and s [w] uniform from the seed: [copies].

    For many rows with a seed each: 2 w random elements replace w * w. Two vectors that differ go together with
    probability at most 2 / p (Schwartz and Zippel: the difference is a polynomial of degree two in r and s).
    """
    w, C, field = isqrt(row.shape[0]), parameters.copies, parameters.field
    random = KeyStream(seed).elements(2 * w * C, field).view(2, C, w)
    half = multiply(random[0], row.view(w, w), field)
    return multiply(half, random[1].T.contiguous(), field).diagonal()


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
