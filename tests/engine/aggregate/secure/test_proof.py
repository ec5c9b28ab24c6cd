"""Projections against plain integers, words that agree and those that do not, and the linear MAC."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.aggregate.secure import proof
from anabranch.aggregate.secure.keys import KeyStream
from anabranch_kernels.field_coding.op import BABYBEAR, FIELDS, GOLDILOCKS, Code, encode, matrix_of, multiply

CPU = torch.device("cpu")


def elements(rows, field=BABYBEAR):
    return matrix_of(rows, field, CPU)


def plain(matrix, field):
    return [proof.integers(row, field) for row in matrix]


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_projections_are_products_with_the_seed_s_elements(session, field):
    p = session(field=field, met=False).parameters
    C, modulus = p.copies, field.p
    L, F, w = p.share_length, proof.FOLD, 3
    rows = KeyStream(bytes(32)).elements(3 * L, field).view(3, L)
    rho = plain(KeyStream(b"s" * 32).challenges(C * L, field).view(C, L), field)
    whole = [[sum(x * y for x, y in zip(row, r, strict=True)) % modulus for r in rho] for row in plain(rows, field)]
    assert plain(proof.project(rows, proof.challenge(b"s" * 32, p), p), field) == whole
    rows = KeyStream(bytes(32)).elements(2 * F * w, field).view(2, F * w)
    seeds = [b"s" * 32, b"t" * 32]
    for row, seed, found in zip(
        plain(rows, field), seeds, plain(proof.project_each(rows, seeds, p), field), strict=True
    ):
        random = plain(KeyStream(seed).challenges(C * (F + w), field).view(C, F + w), field)
        assert found == [
            sum(row[w * a + b] * one[a] * one[F + b] for a in range(F) for b in range(w)) % modulus for one in random
        ]


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_challenges_come_from_a_set_as_large_as_the_bound_needs(field):
    """Canonical, of all the bits of 2^(bits - 1) numbers, and no further."""
    found = proof.integers(KeyStream(bytes(32)).challenges(200, field), field)
    assert 2 ** (field.bits - 2) < max(found) < 2 ** (field.bits - 1) < field.p
    assert min(found) < 2 ** (field.bits - 3)
    assert len(set(found)) == 200


def test_rows_fold_without_a_rest():
    assert [proof.folded(n) for n in (1, 32, 33, 64)] == [32, 32, 64, 64]


@given(st.integers(0, 2**30), st.sampled_from([BABYBEAR, GOLDILOCKS, FIELDS["m31"]]), st.integers(0, 3))
def test_wrong_letters_are_found_whatever_words_they_are_in(seed, field, errors):
    numbers = random.Random(seed)
    code = Code(field=field, clients=14, blocks=4, privacy=2)
    values = [[numbers.randrange(field.p) for _ in range(3)] for _ in range(6)]
    clients = sorted(numbers.sample(range(14), 6 + 2 * errors + numbers.randrange(8 - 2 * errors + 1)))
    letters = encode(elements(values, field), code)[clients]
    wrong = sorted(numbers.sample(range(len(clients)), errors))
    for row in wrong:
        column = numbers.randrange(3)
        letters[row, column] = elements([[(int(letters[row, column]) + 1) % 2**62 % field.p]], field)[0, 0]
    found = proof.locate(code, clients, letters, errors)
    assert found == tuple(clients[row] for row in wrong)
    kept = [row for row in range(len(clients)) if row not in wrong]
    data = proof.consistent(code, [clients[row] for row in kept], letters[kept])
    assert data is not None
    assert plain(data, field) == values[:4]
    if errors and len(clients) > 6:
        assert proof.consistent(code, clients, letters) is None
        assert proof.locate(code, clients, letters, errors - 1) is None


def test_a_mac_is_linear_and_notices_one_element(session):
    p = session(proof="V1", met=False).parameters
    key = proof.mac_key(bytes(32), 1, p)
    first, second = KeyStream(bytes(32)).elements(2 * 15, p.field).view(2, 3, 5)
    masks = [proof.mac_mask(bytes(32), 1, owner, p) for owner in (0, 1)]
    tags = [proof.mac(key, blocks, mask, p) for blocks, mask in zip((first, second), masks, strict=True)]

    def combined(a, b):
        weights = elements([[2, 3]])
        return multiply(weights, torch.stack([a.reshape(-1), b.reshape(-1)]), p.field).view(a.shape)

    mask = combined(*masks)
    total = combined(first, second)
    assert torch.equal(proof.mac(key, total, mask, p), combined(*tags))
    total[2, 4] = (total[2, 4] + 1) % p.field.p
    assert not torch.equal(proof.mac(key, total, mask, p), combined(*tags))


def test_macs_of_rounds_and_owners_differ(session):
    p = session(proof="V1", met=False).parameters
    masks = {tuple(proof.mac_mask(bytes(32), number, owner, p).tolist()) for number in (1, 2) for owner in (0, 1)}
    assert len(masks) == 4
    assert not torch.equal(proof.mac_key(bytes(32), 1, p)[0], proof.mac_key(bytes(32), 2, p)[0])


def test_digests_of_other_labels_differ():
    assert len({proof.digest_of(label, b"x") for label in ("owner", "sum", "view")}) == 3
