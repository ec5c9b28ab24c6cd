"""Thresholds that hold, weights that fit, and a digest of everything."""

from dataclasses import fields, replace
from hashlib import sha256

import cbor2
import pytest

from anabranch.aggregate.secure.parameters import Parameters
from anabranch_kernels.field_coding.op import F50, FIELDS, GOLDILOCKS, FixedPoint


def key(i):
    return sha256(bytes([i])).digest()


def make(N=9, **changes):
    settings = {
        "session": bytes(16), "identities": tuple(key(i) for i in range(N)), "server": key(255), "length": 100,
        "fixed_point": FixedPoint(clip=1.0, fraction_bits=16), "blocks": 3, "privacy": 2, "errors": 1, "dropouts": 2,
    }  # fmt: skip
    return Parameters(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"session": bytes(15)}, "16 to 64 bytes"),
        ({"identities": (key(1),) * 9}, "different Ed25519"),
        ({"server": key(0)}, "different Ed25519"),
        ({"identities": tuple(key(i)[:31] for i in range(9))}, "of 32 bytes"),
        ({"field": replace(GOLDILOCKS, p=97)}, "unknown field"),
        ({"mode": "sideways"}, "mode must be one of"),
        ({"proof": "V3"}, "proof one of"),
        ({"length": 0}, "length must be 1 to"),
        ({"blocks": 0}, "K, T >= 1"),
        ({"privacy": 0}, "K, T >= 1"),
        ({"errors": -1}, "E, D >= 0"),
        ({"blocks": 4}, "N - D >= K \\+ T \\+ 2E"),
        ({"blocks": 1, "privacy": 4, "errors": 0, "dropouts": 3}, "more than \\(N \\+ T \\+ E\\) / 2"),
        ({"N": 3, "blocks": 1, "privacy": 2, "errors": 0, "dropouts": 0}, "T \\+ 2 vectors"),
        ({"weights": (1,) * 8}, "weights must be 9 integers"),
        ({"weights": (0,) + (1,) * 8}, "from 1 on"),
        ({"weights": (2**20,) * 9}, "at most a weight of"),
    ],
)
def test_what_cannot_hold_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make(**changes)


def test_parameters_survive_the_wire():
    for made in (make(), make(weights=tuple(range(1, 10)), field=F50, mode="mask", proof="V1")):
        back = Parameters.decode(made.encode())
        assert back.digest == made.digest
        assert (back.identities, back.all_weights, back.fixed_point) == (
            made.identities,
            made.all_weights,
            made.fixed_point,
        )


def test_other_bytes_are_no_parameters():
    plain = cbor2.loads(make().encode())
    for change in (
        {"session": [1] * 16}, {"server": [1] * 32}, {"length": 10.0}, {"blocks": True}, {"weights": [1.0] * 9},
        {"identities": [list(key(i)) for i in range(9)]}, {"clip": "1"}, {"p": 97}, {"version": 1}, {"more": 1},
        {"field": "m13"}, {"privacy": 99}, {"fraction_bits": 60},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no parameters"):
            Parameters.decode(cbor2.dumps(plain | change, canonical=True))
    good = make().encode()
    for bad in (b"", good[:-1], good + b"\0", b"\xff" * 9, cbor2.dumps(plain)):
        with pytest.raises(ValueError, match="no parameters"):
            Parameters.decode(bad)


def test_every_parameter_changes_the_digest():
    base = make(blocks=1, dropouts=1)
    other = {
        "session": bytes(17), "identities": tuple(key(i) for i in range(1, 10)), "server": key(254), "length": 101,
        "fixed_point": FixedPoint(clip=1.0, fraction_bits=15), "blocks": 2, "privacy": 1, "errors": 0, "dropouts": 0,
        "weights": (2,) + (1,) * 8, "field": F50, "mode": "mask", "proof": "V1",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(Parameters)}
    digests = {replace(base, **{name: value}).digest for name, value in other.items()} | {base.digest}
    assert len(digests) == len(other) + 1
    assert replace(base, weights=(1,) * 9).digest == base.digest  # ones are ones


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_checks_fail_with_less_than_two_to_the_minus_hundred(field):
    """A projection by a tensor product misses with at most 2 / p."""
    assert (field.p / 2) ** make(field=field).copies > 2**100


def test_two_quorums_share_an_honest_client():
    for N in range(5, 40):
        for T in range(1, N // 4 + 1):
            made = make(N=N, blocks=1, privacy=T, errors=1, dropouts=0)
            assert 2 * made.quorum - N > T + 1
