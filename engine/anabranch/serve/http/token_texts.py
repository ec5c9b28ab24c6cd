"""What single tokens stand for: the bytes behind each, and a name for it in lists of log-probabilities.

A token need not be text: byte-level and byte-fallback vocabularies cut characters apart, and decoding such a token
alone gives U+FFFD. Its bytes are then read from the vocabulary's own spelling, and it is named as OpenAI names it,
"bytes:\\xe2\\x82". The bytes of an output's tokens, put together, are its text.
"""

import re
from typing import Any

from anabranch.common.byte_alphabet import byte_alphabet

REPLACEMENT = "\ufffd"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte in SentencePiece's vocabularies
ANCHOR = "a"  # decoded before a token, which would lose its leading space at the start of a text


class TokenTexts:
    """Bytes and names of tokens, remembered. `tokenizer` is a `tokenizers.Tokenizer`, or None."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, str] = {}
        self._alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._anchor: list[int] = []
        self.special: frozenset[int] = frozenset()
        if tokenizer is not None:
            self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False).ids
            added = tokenizer.get_added_tokens_decoder()
            self.special = frozenset(token for token, how in added.items() if how.special)
        self._anchor_text = self._decode(self._anchor)

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._read(token)
        return found

    def name(self, token: int) -> str:
        """The token as text; "bytes:..." if it is none; "token_id:..." without a tokenizer."""
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self._spell(token)
        return found

    def _read(self, token: int) -> bytes:
        text = self._decode([*self._anchor, token])
        text = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode([token])
        spelling = None if self._tokenizer is None else self._tokenizer.id_to_token(token)
        if REPLACEMENT not in text or spelling is None:
            return text.encode()
        if match := BYTE.fullmatch(spelling):
            return bytes([int(match[1], 16)])
        if all(character in self._alphabet for character in spelling):
            return bytes(self._alphabet[character] for character in spelling)
        return text.encode()

    def _spell(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, ids: list[int]) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode(ids, skip_special_tokens=False))
