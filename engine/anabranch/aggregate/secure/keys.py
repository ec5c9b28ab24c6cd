"""Keys and what they are for: identities, keys of pairs of clients, sealed shares, streams of field elements.

    Z           = X25519(own secret, other's public)                     all-zero Z is refused
    K_{i->j}    = HKDF-SHA256(Z, salt = SHA-256(sorted public keys || session), info = label || i || j)
    ciphertext  = AES-256-GCM(K_{i->j}, nonce = round || chunk || 0, share, additional data = who, when, which chunk,
                  digest of the header that commits to all shares of this owner)

A key lives as long as its session and seals each (round, chunk) once; so a client that was restarted must not go on
with a session: it has forgotten which rounds it sealed. All primitives are those of `cryptography`.
"""

import secrets
from collections.abc import Callable, Iterator
from hashlib import sha256

import torch
from torch import Tensor

from anabranch.aggregate.secure.errors import EXTRA
from anabranch_kernels.field_coding.op import Field, accept

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise ImportError(EXTRA) from error

Randomness = Callable[[int], bytes]  # so many bytes that nobody can guess; secrets.token_bytes outside of tests

CHUNK = 1 << 20  # bytes of plaintext under one nonce
TAG = 16  # bytes that sealing adds to a chunk


class Identity:
    """A long-term Ed25519 key; `public` is what others know a party by."""

    def __init__(self, secret: bytes | None = None) -> None:
        """secret: 32 bytes to go on with an identity, None for a new one."""
        self._key = Ed25519PrivateKey.generate() if secret is None else Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(message)


def is_signed(message: bytes, signature: bytes, public: bytes) -> bool:
    """Whether the owner of `public` signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


class SessionKey:
    """An X25519 key for one session."""

    def __init__(self, randomness: Randomness = secrets.token_bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(randomness(32))
        self.public = self._key.public_key().public_bytes_raw()

    @property
    def secret(self) -> bytes:
        """32 bytes, for `resumable` alone."""
        return self._key.private_bytes_raw()

    def pair(self, own: int, other: int, public: bytes, session: bytes) -> tuple[AESGCM, AESGCM]:
        """Ciphers for what client `own` sends to client `other` and for what it receives from there.

        Raises ValueError for a public key of low order, which would give a key that everybody knows.
        """
        shared = self._key.exchange(X25519PublicKey.from_public_bytes(public))  # itself refuses an all-zero result
        salt = sha256(b"".join(sorted((self.public, public))) + session).digest()
        sending, receiving = (
            AESGCM(derive(shared, b"svafd/share/v1" + _index(i) + _index(j), salt))
            for i, j in ((own, other), (other, own))
        )
        return sending, receiving


def derive(secret: bytes, label: bytes, salt: bytes | None = None) -> bytes:
    """32 bytes for one purpose, by HKDF-SHA256."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=label).derive(secret)


def sealed_length(length: int) -> int:
    """Bytes of the ciphertext of so many bytes."""
    return length + TAG * -(-length // CHUNK)


def seal(cipher: AESGCM, share: memoryview, out: memoryview, number: int, context: bytes) -> None:
    """Encrypt a share for round `number` into `out`, of sealed_length(len(share)) bytes."""
    for chunk, plain, sealed, about in _chunks(share, out, context):
        cipher.encrypt_into(_nonce(number, chunk), plain, about, sealed)


def unseal(cipher: AESGCM, sealed: memoryview, out: memoryview, number: int, context: bytes) -> bool:
    """Decrypt into `out`; False if anything differs from what was sealed, and then `out` means nothing."""
    try:
        for chunk, plain, part, about in _chunks(out, sealed, context):
            cipher.decrypt_into(_nonce(number, chunk), part, about, plain)
    except InvalidTag:
        return False
    return True


class KeyStream:
    """Uniform elements of a field from 32 bytes: AES-256 in counter mode, and rejection."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def elements(self, count: int, field: Field) -> Tensor:
        """The next `count` elements: [count] field.dtype."""
        found: list[Tensor] = []
        missing = count
        while missing > 0:
            words = int(missing * 2**field.bits / field.p * 1.002) + 64  # rarely a second time
            accepted = accept(self._bytes(words * field.bytes), field)
            found.append(accepted[:missing])
            missing -= len(found[-1])
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0, dtype=field.dtype)

    def challenges(self, count: int, field: Field) -> Tensor:
        """The next `count` numbers, uniform below 2^(bits - 1) < p: what a random check needs, and nothing is rejected.

        Checks are sound by Schwartz and Zippel, whose bound asks for the size of the set alone. Not for what must hide.
        """
        words = self._bytes(count * field.bytes).view(field.dtype)
        return words.bitwise_and_((1 << (field.bits - 1)) - 1)

    def _bytes(self, count: int) -> Tensor:
        stream = bytearray(count)
        self._encryptor.update_into(stream, stream)
        return torch.frombuffer(stream, dtype=torch.uint8)


def _chunks(
    plain: memoryview, sealed: memoryview, context: bytes
) -> Iterator[tuple[int, memoryview, memoryview, bytes]]:
    count = -(-len(plain) // CHUNK)
    for chunk in range(count):
        start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, len(plain))
        about = context + _index(chunk) + _index(count)
        yield chunk, plain[start:end], sealed[start + chunk * TAG : end + (chunk + 1) * TAG], about


def _nonce(number: int, chunk: int) -> bytes:
    return _index(number) + _index(chunk) + bytes(4)


def _index(value: int) -> bytes:
    return value.to_bytes(4, "big")
