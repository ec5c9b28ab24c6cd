"""Log-probabilities as OpenAI's two APIs show them."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anabranch.serve.http.token_texts import TokenTexts
from anabranch.serve.request import Logprob

LOWEST = -9999.0  # in place of minus infinity, which JSON does not have
Position = Mapping[int, Logprob] | None  # None for a text's first token: nothing predicts it


class CompletionLogprobs:
    """The lists of /v1/completions for one choice, part by part: offsets count characters of the choice's text."""

    def __init__(self, texts: TokenTexts, *, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._silent = texts.special if skip_special_tokens else frozenset()
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, tokens: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The next tokens."""
        name = self._texts.name
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [
                None if position is None else _finite(position[token].logprob)
                for token, position in zip(tokens, positions, strict=True)
            ],
            "top_logprobs": [None if position is None else self._top(position) for position in positions],
            "text_offset": [self._advance(token) for token in tokens],
        }

    def _top(self, position: Mapping[int, Logprob]) -> dict[str, float]:
        """By name; of two tokens with one name the more probable."""
        top: dict[str, float] = {}
        for token, candidate in position.items():
            name, value = self._texts.name(token), _finite(candidate.logprob)
            top[name] = max(value, top.get(name, value))
        return top

    def _advance(self, token: int) -> int:
        offset = self._offset
        if token not in self._silent:
            self._offset += len(self._decoder.decode(self._texts.bytes_of(token)))
        return offset


def chat_logprobs(
    texts: TokenTexts, tokens: Iterable[int], positions: Iterable[Mapping[int, Logprob]], top: int
) -> dict[str, Any]:
    """The object of /v1/chat/completions: for each token itself, and the `top` most probable ones."""
    content = []
    for token, position in zip(tokens, positions, strict=True):
        best = sorted((c.rank, other) for other, c in position.items() if c.rank <= top)[:top]
        shown = _candidate(texts, token, position)
        content.append({**shown, "top_logprobs": [_candidate(texts, other, position) for _, other in best]})
    return {"content": content, "refusal": None}


def _candidate(texts: TokenTexts, token: int, position: Mapping[int, Logprob]) -> dict[str, Any]:
    value = _finite(position[token].logprob)
    return {"token": texts.name(token), "logprob": value, "bytes": list(texts.bytes_of(token))}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
