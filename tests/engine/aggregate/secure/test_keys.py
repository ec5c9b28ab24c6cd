"""Keys of pairs agree and have a direction; sealed shares open only as they were meant; streams are uniform."""

import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from anabranch.aggregate.secure import keys
from anabranch.aggregate.secure.keys import (
    CHUNK,
    Identity,
    KeyStream,
    SessionKey,
    derive,
    is_signed,
    seal,
    sealed_length,
    unseal,
)
from anabranch_kernels.field_coding.op import BABYBEAR, FIELDS, is_canonical


def pair():
    """The ciphers of client 0 and client 1: (to 1, from 1), (to 0, from 0)."""
    first, second = SessionKey(), SessionKey()
    return first.pair(0, 1, second.public, b"s"), second.pair(1, 0, first.public, b"s")


def sealed(cipher, share, number=7, context=b"c"):
    out = memoryview(bytearray(sealed_length(len(share))))
    seal(cipher, memoryview(share), out, number, context)
    return out


def opened(cipher, data, length, number=7, context=b"c"):
    out = memoryview(bytearray(length))
    return bytes(out) if unseal(cipher, data, out, number, context) else None


@pytest.mark.parametrize("length", [4, 100, CHUNK, CHUNK + 4, 3 * CHUNK - 8])
def test_what_is_sealed_opens(length):
    (sending, _), (_, receiving) = pair()
    share = bytes(range(251)) * (length // 251) + bytes(length % 251)
    assert opened(receiving, sealed(sending, share), length) == share


def test_and_only_as_it_was_meant():
    (sending, own_receiving), (other_sending, receiving) = pair()
    share, length = bytes(2 * CHUNK), 2 * CHUNK
    data = sealed(sending, share)
    half = CHUNK + keys.TAG
    assert opened(receiving, data, length) == share
    assert opened(receiving, data, length, number=8) is None
    assert opened(receiving, data, length, context=b"d") is None
    assert opened(receiving, memoryview(bytes(data[half:]) + bytes(data[:half])), length) is None  # chunks swapped
    assert opened(receiving, data[:half], CHUNK) is None  # one chunk of two
    for cipher in (sending, own_receiving, other_sending):  # the other direction has another key
        assert (opened(cipher, data, length) is None) == (cipher is not sending)
    data[5] ^= 1
    assert opened(receiving, data, length) is None


def test_keys_depend_on_the_session_and_on_both_clients():
    first, second = SessionKey(), SessionKey()
    data = sealed(first.pair(0, 1, second.public, b"s")[0], bytes(8))
    assert opened(second.pair(1, 0, first.public, b"s")[1], data, 8) is not None
    assert opened(second.pair(1, 0, first.public, b"t")[1], data, 8) is None
    assert opened(second.pair(2, 0, first.public, b"s")[1], data, 8) is None


@pytest.mark.parametrize("point", [0, 1])
def test_public_keys_of_low_order_are_refused(point):
    with pytest.raises(ValueError, match="Error computing shared key"):
        SessionKey().pair(0, 1, point.to_bytes(32, "little"), b"s")


def test_identities_sign():
    identity = Identity(bytes(32))
    signature = identity.sign(b"message")
    assert is_signed(b"message", signature, identity.public)
    assert not is_signed(b"massage", signature, identity.public)
    assert not is_signed(b"message", signature, Identity().public)
    assert not is_signed(b"message", bytes(64), identity.public)
    assert Identity(bytes(32)).public == identity.public != Identity().public


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_streams_are_the_cipher_s_words_below_p(field):
    """Against the cipher called once, and rejection in plain integers."""
    key = sha256(b"key").digest()
    stream = KeyStream(key)
    found = [x % 2**64 if x < 0 else x for x in torch.cat([stream.elements(n, field) for n in (0, 1000)]).tolist()]
    plain = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(20000))
    words = [int.from_bytes(plain[k : k + field.bytes], "little") for k in range(0, 20000, field.bytes)]
    masked = [word & ((1 << field.bits) - 1) for word in words]
    assert found == [word for word in masked if word < field.p][:1000]


def test_streams_go_on():
    stream = KeyStream(bytes(32))
    first, second = stream.elements(5000, BABYBEAR), stream.elements(5000, BABYBEAR)
    assert is_canonical(first, BABYBEAR)
    assert not torch.equal(first, second)
    mean = torch.cat([first, second]).double().mean() / BABYBEAR.p
    assert abs(float(mean) - 0.5) < 0.015  # five deviations of the mean of 10 000 uniform numbers


def test_derived_keys_are_known_answers():
    """RFC 5869, test case 3 (no salt, no info), and a label."""
    secret = b"\x0b" * 22
    assert derive(secret, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert derive(secret, b"label") != derive(secret, b"")


@pytest.mark.parametrize(("module", "work"), [("cryptography", ""), ("cbor2", "errors.cbor()")])
def test_without_its_libraries_the_extra_is_named(module, work):
    code = f"import sys; sys.modules[{module!r}] = None; from anabranch.aggregate.secure import client, errors; {work}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'anabranch[secure]'" in done.stderr.splitlines()[-1]
