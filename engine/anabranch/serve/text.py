"""Text of an output while its tokens arrive: whole characters only, and nothing that may still become a stop text."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes a part of a character to
CONTEXT = 6  # tokens decoded again with a new one: enough for a character's bytes and for spaces between words
WINDOW = 24  # tokens decoded at once before the window moves up, at the end of a character
BYTES = 4  # of the longest character
LIMIT = 256  # the same when no character ends: bytes that are no text


class TextStream:
    """Decodes one output step by step, in the context of its prompt, and watches for stop texts.

    decode   token ids to text, as the tokenizer does it; an unfinished character at the end gives U+FFFD
    context  the prompt's tokens: a word after it starts with a space, which a tokenizer drops at the start of a text
    """

    __slots__ = ("_decode", "_held", "_released", "_search_from", "_shown", "_stops", "_tokens", "text")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Sequence[int],
        stops: Sequence[str] = (),
        *,
        keep: bool = False,
    ) -> None:
        self.text = ""
        self._decode = decode
        self._stops = [(stop, len(stop) if keep else 0) for stop in stops]
        self._tokens: list[int] = []
        self._shown = 0  # characters of the decoded window that are in `text`, or belong to the context
        self._search_from = 0
        self._released = 0
        self._restart(list(context))

    def feed(self, tokens: Sequence[int], *, watch: bool = True) -> str | None:
        """Add tokens. Returns the stop text they complete, if any; `text` then ends before it (or with it, if kept).

        The text is the same however its tokens are divided between calls. With watch=False a stop text is ordinary
        text, also later.
        """
        self._tokens += tokens
        whole, clean = self._read(self._tokens)
        before = len(self.text)
        if len(whole) > self._shown:
            self.text += whole[self._shown :]
            self._shown = len(whole)
        if len(self._tokens) > (WINDOW if clean else LIMIT):
            self._restart(self._tokens)
        if not watch:
            self._search_from = len(self.text)
            return None
        return self._cut(before)

    def release(self, *, final: bool = False) -> str:
        """Text that has not been released yet, without an end that may become a stop text (unless it is final)."""
        end = len(self.text) if final else len(self.text) - self._undecided()
        piece = self.text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _restart(self, tokens: list[int]) -> None:
        """Keep the last tokens only, from where a character begins: that is at most three bytes further back."""
        for size in range(CONTEXT, CONTEXT + BYTES):
            self._tokens = tokens[-size:]
            whole, _ = self._read(self._tokens)
            if whole and not whole.startswith(REPLACEMENT):
                break
        self._shown = len(whole)

    def _read(self, tokens: list[int]) -> tuple[str, bool]:
        """The text up to its last whole character, and whether that is all of it.

        An unfinished character may spoil the finished ones beside it (byte fallback gives U+FFFD for each byte of the
        run), so up to three tokens are also left out.
        """
        best = ""
        for end in range(len(tokens), max(len(tokens) - BYTES, 0), -1):
            window = self._decode(tokens[:end])
            best = max(best, window.rstrip(REPLACEMENT), key=len)
            if not window.endswith(REPLACEMENT):
                return best, end == len(tokens)
        return best, False

    def _cut(self, before: int) -> str | None:
        """Look for the stop text that ends first, of several the longest, and cut there."""
        found = []
        for stop, kept in self._stops:
            start = self.text.find(stop, max(self._search_from, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, kept, stop))
        if not found:
            return None
        _, start, kept, stop = min(found)
        self.text = self.text[: start + kept]
        return stop

    def _undecided(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop text."""
        tail = self.text[self._search_from :]
        longest = max((len(stop) for stop, _ in self._stops), default=1) - 1
        for length in range(min(longest, len(tail)), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop, _ in self._stops):
                return length
        return 0
