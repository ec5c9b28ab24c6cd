"""A request and its samples while they grow: when a sample ends, and what it has to show."""

from collections.abc import Callable
from dataclasses import dataclass, field

from anabranch.serve.choose import NO_TOKEN
from anabranch.serve.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from anabranch.serve.sampler import Candidate, Draw
from anabranch.serve.scheduler import Sequence
from anabranch.serve.text import TextStream

TokenText = Callable[[int], str | None]  # a token alone as text; None without a tokenizer


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A prompt and its samples on the way."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    samples: list["Sample"] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    def report(self, samples: list["Sample"]) -> RequestOutput:
        """All there is of these samples; for a stream, what is new in them."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.report() for sample in samples],
            finished=self.finished,
            num_cached_tokens=self.samples[0].hit_tokens or 0,
            metrics=self.metrics,
            error=self.error,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Sample(Sequence):
    """One output of a request. Its text is decoded token by token only for a stream or for stop texts."""

    request: Request
    index: int
    draw: Draw
    stop_ids: frozenset[int]
    silent_ids: frozenset[int]  # those of stop_ids that end the output without being named as its stop_reason
    text: TextStream | None  # None without a tokenizer
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float = 0.0
    reported: int = 0  # output tokens shown so far
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def advance(self, token: int, candidates: list[Candidate] | None, token_text: TokenText) -> None:
        """Append the next token and see whether it is the last."""
        matcher = self.draw.matcher
        if token == NO_TOKEN:
            problem = None if matcher is None else matcher.problem
            raise ValueError(problem or "the model's scores of the next token are not numbers (NaN)")
        self.tokens.append(token)
        if candidates is not None and self.logprobs is not None:
            self.logprobs.append(name_candidates(candidates, token_text))
            self.cumulative_logprob += candidates[0][1]
        if token in self.stop_ids:
            self.finish_reason, self.stop_reason = "stop", None if token in self.silent_ids else token
        elif matcher is not None and matcher.ended:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_len:
            self.finish_reason = "length"
        if self.text is not None:
            self._decode(self.text)

    def _decode(self, text: TextStream) -> None:
        params = self.request.params
        first = len(self.tokens) - 1
        if not (self.request.stream or params.stops):
            if self.finish_reason is None:
                return
            first = len(self.request.prompt_token_ids)
        hide = self.tokens[-1] in self.stop_ids and not params.include_stop_str_in_output
        produced = len(self.tokens) - len(self.request.prompt_token_ids)
        stop = text.feed(self.tokens[first : -1 if hide else None], watch=produced >= params.min_tokens)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop

    def report(self) -> CompletionOutput:
        """For a stream, what is new since the last report."""
        stream, done = self.request.stream, self.finish_reason is not None
        start = self.reported
        self.reported = len(self.tokens) - len(self.request.prompt_token_ids) if stream else 0
        decoded = None
        if self.text is not None:
            decoded = self.text.release(final=done) if stream else self.text.text
        return CompletionOutput(
            index=self.index,
            decoded=decoded,
            token_ids=self.tokens[len(self.request.prompt_token_ids) + start :],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[start:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def extend_prompt_logprobs(request: Request, found: list[list[Candidate]], token_text: TokenText) -> None:
    """Add the candidates of the next positions of the prompt."""
    assert request.prompt_logprobs is not None
    request.prompt_logprobs += [name_candidates(candidates, token_text) for candidates in found]
    if len(request.prompt_logprobs) == len(request.prompt_token_ids):
        request.samples[0].reuse = True  # nothing is missing: after a pre-emption cached blocks will do


def name_candidates(candidates: list[Candidate], token_text: TokenText) -> dict[int, Logprob]:
    return {token: Logprob(logprob, rank, token_text(token)) for token, logprob, rank in candidates}
