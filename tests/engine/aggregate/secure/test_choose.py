"""Whose vectors are summed when some owners cheat and some clients lie about them."""

import pytest

from anabranch.aggregate.secure.choose import NO_POLYNOMIAL, choose_owners
from anabranch.aggregate.secure.keys import KeyStream
from anabranch_kernels.field_coding.op import encode

N = 13
ALL = tuple(range(N))


@pytest.fixture
def parameters(session):
    return session(N=N, errors=2, dropouts=1, met=False).parameters  # K + T = 5


def honest(parameters):
    """letters[i][j] as they are if nobody lies."""
    p = parameters
    values = KeyStream(bytes(32)).elements(5 * N * p.copies, p.field).view(5, N * p.copies)
    words = encode(values, p.code).view(N, N, p.copies)
    return {i: {j: words[j, i].clone() for j in ALL} for i in range(N)}


def spoil(letters, owner, client):
    letters[owner][client][1] = (letters[owner][client][1] + 1) % 1000


def test_without_lies_all_are_in(parameters):
    choice = choose_owners(honest(parameters), ALL, parameters)
    assert (choice.accepted, choice.suspects, choice.excluded) == (ALL, (), {})


@pytest.mark.parametrize("missing", [False, True])
def test_clients_in_most_disputes_are_suspects(parameters, missing):
    letters = honest(parameters)
    for owner in range(0, N, 2):
        for client in (4, 9):
            if missing:
                del letters[owner][client]
            else:
                spoil(letters, owner, client)
    spoil(letters, 3, 7)
    choice = choose_owners(letters, ALL, parameters)
    assert choice.suspects == (4, 9)
    assert choice.excluded == {3: "its share is disputed by client 7"}
    assert choice.accepted == tuple(i for i in ALL if i != 3)


def test_an_owner_that_fits_no_polynomial(parameters):
    letters = honest(parameters)
    for client in range(5):
        spoil(letters, 2, client)
    choice = choose_owners(letters, ALL, parameters)
    assert choice.excluded == {2: NO_POLYNOMIAL}
    assert choice.suspects == ()


def test_an_owner_that_many_refuse(parameters):
    letters = honest(parameters)
    for client in range(9):
        del letters[2][client]
    for client in range(3):
        del letters[6][client]
    choice = choose_owners(letters, ALL, parameters)
    assert choice.excluded == dict(
        zip((2, 6), (f"{n} clients refuse or contradict its shares" for n in (9, 3)), strict=True)
    )


def test_clients_that_did_not_answer_are_in_no_dispute(parameters):
    letters = honest(parameters)
    some = tuple(j for j in ALL if j not in (0, 5))
    letters = {i: {j: word[j] for j in some} for i, word in letters.items()}
    choice = choose_owners(letters, some, parameters)
    assert (choice.accepted, choice.suspects, choice.excluded) == (ALL, (), {})


def test_words_are_not_mistaken_for_each_other(parameters):
    """Letters about another owner are wrong although they lie on a polynomial."""
    letters = honest(parameters)
    letters[0], letters[1] = dict(letters[0]), dict(letters[1])
    for client in (2, 3):
        letters[0][client], letters[1][client] = letters[1][client], letters[0][client]
    choice = choose_owners(letters, ALL, parameters)
    assert choice.suspects == (2, 3)
    assert choice.accepted == ALL


def test_no_letters_at_all(parameters):
    choice = choose_owners({0: {}}, ALL, parameters)
    assert choice.excluded == {0: "13 clients refuse or contradict its shares"}
    assert choice.accepted == ()
