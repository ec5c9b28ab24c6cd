"""From a job's outputs to the JSON of the two APIs: a body when all is done, events as it comes.

Events are put together from bytes: what all events of a request share is written once, and only the new text goes
through the JSON encoder.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import orjson

from anabranch.serve.async_engine import Job
from anabranch.serve.http.errors import ApiError
from anabranch.serve.http.logprobs import CompletionLogprobs, Position, chat_logprobs
from anabranch.serve.http.protocol import ChatRequest, CompletionRequest, Sampling
from anabranch.serve.http.token_texts import TokenTexts
from anabranch.serve.request import CompletionOutput, RequestOutput


@dataclass(slots=True)
class Usage:
    """Tokens of one request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def show(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer(ABC):
    """What one request is answered. Choice i of prompt p has the index p * n + i.

    kind, part_kind  the "object" of the whole and of an event
    heavy            the body is so long that it is better built off the event loop
    """

    kind: str
    part_kind: str
    heavy: bool

    def __init__(self, request: Sampling, model: str, texts: TokenTexts, prefix: str) -> None:
        self.request = request
        self.texts = texts
        self.usage = Usage()
        self._head = {"id": f"{prefix}-{token_hex(12)}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()  # choices
        self._counted: set[int] = set()  # prompts

    @abstractmethod
    def choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput, *, first: bool, part: bool
    ) -> dict[str, Any] | None:
        """One choice, or a part of it; None for a part that shows nothing."""

    async def body(self, job: Job) -> dict[int, RequestOutput]:
        """All outputs by prompt, for `build`."""
        outputs: dict[int, RequestOutput] = {}
        async for found in job:
            for index, output in found:
                raise_if_failed(output)
                outputs[index] = output
        return outputs

    def build(self, outputs: Mapping[int, RequestOutput]) -> bytes:
        """The whole answer."""
        choices = []
        for prompt, output in sorted(outputs.items()):
            self._count(prompt, output)
            for sample in output.outputs:
                index = prompt * self.request.n + sample.index
                choices.append(self.choice(index, output, sample, first=True, part=False))
        return orjson.dumps({**self._head, "object": self.kind, "choices": choices, "usage": self.usage.show()})

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The answer in parts, each one or more events ready to be sent; the closing [DONE] is the sender's."""
        include_usage = self.request.include_usage
        head = orjson.dumps({**self._head, "object": self.part_kind})[:-1] + b',"choices":['
        start, end = b"data: " + head, b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        async for found in job:
            pieces: list[bytes] = []
            for prompt, output in found:
                raise_if_failed(output)
                self._count(prompt, output)
                for sample in output.outputs:
                    index = prompt * self.request.n + sample.index
                    choice = self.choice(index, output, sample, first=index not in self._begun, part=True)
                    self._begun.add(index)
                    if choice is not None:
                        pieces += (start, orjson.dumps(choice), end)
            if pieces:
                yield b"".join(pieces)
        if include_usage:
            yield start + b'],"usage":' + orjson.dumps(self.usage.show()) + b"}\n\n"

    def _count(self, prompt: int, output: RequestOutput) -> None:
        if prompt not in self._counted:
            self._counted.add(prompt)
            self.usage.prompt += len(output.prompt_token_ids)
            self.usage.cached += output.num_cached_tokens
        self.usage.completion += sum(len(sample.token_ids) for sample in output.outputs)


class CompletionAnswer(Answer):
    """Of /v1/completions. `echoed` holds the prompts' texts when they are to be shown."""

    kind = part_kind = "text_completion"

    def __init__(self, request: CompletionRequest, model: str, texts: TokenTexts, echoed: Sequence[str] | None) -> None:
        super().__init__(request, model, texts, "cmpl")
        self.heavy = request.logprobs is not None
        self._echoed = echoed
        self._shows_ids = request.return_token_ids
        self._shows_logprobs = request.logprobs is not None
        self._silent = request.max_tokens == 0  # the engine makes one token at least
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput, *, first: bool, part: bool
    ) -> dict[str, Any] | None:
        text, tokens, positions = sample.decoded or "", sample.token_ids, list[Position](sample.logprobs or ())
        reason = sample.finish_reason
        if self._silent:
            text, tokens, positions, reason = "", [], [], reason and "length"
        if first and self._echoed is not None:
            text = self._echoed[index // self.request.n] + text
            if self._shows_logprobs:
                tokens, positions = output.prompt_token_ids + tokens, [*(output.prompt_logprobs or ()), *positions]
        if part and not (text or reason or (tokens and (self._shows_logprobs or self._shows_ids))):
            return None
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        choice["stop_reason"] = sample.stop_reason
        if self._shows_logprobs:
            choice["logprobs"] = self._writer(index).show(tokens, positions)
        if self._shows_ids:
            choice["token_ids"] = [] if self._silent else sample.token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _count(self, prompt: int, output: RequestOutput) -> None:
        super()._count(prompt, output)
        if self._silent:
            self.usage.completion = 0

    def _writer(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            skip = self.request.skip_special_tokens
            self._logprobs[index] = CompletionLogprobs(self.texts, skip_special_tokens=skip)
        return self._logprobs[index]


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, model: str, texts: TokenTexts) -> None:
        super().__init__(request, model, texts, "chatcmpl")
        self.heavy = request.logprobs
        self._top = (request.top_logprobs or 0) if request.logprobs else None

    def choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput, *, first: bool, part: bool
    ) -> dict[str, Any] | None:
        text, logged = sample.decoded or "", self._top is not None
        shows_ids = self.request.return_token_ids
        if part and not (first or text or sample.finish_reason or (sample.token_ids and (logged or shows_ids))):
            return None
        message: dict[str, Any] = {"role": "assistant", "content": text} if first else {"content": text}
        choice: dict[str, Any] = {"index": index, "delta" if part else "message": message, "logprobs": None}
        choice["finish_reason"], choice["stop_reason"] = sample.finish_reason, sample.stop_reason
        if self._top is not None:
            choice["logprobs"] = chat_logprobs(self.texts, sample.token_ids, sample.logprobs or (), self._top)
        if shows_ids:
            choice["token_ids"] = sample.token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice


def raise_if_failed(output: RequestOutput) -> None:
    if output.error is not None:
        raise ApiError(500, f"the request failed while it ran: {output.error}", code="request_failed")
