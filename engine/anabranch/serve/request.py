"""What a user asks for and what comes back, under the names that vLLM's users know. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from anabranch.serve.structured import StructuredOutput

GREEDY_BELOW = 1e-5  # temperatures below this take the most probable token
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    n                   independent samples of one prompt
    temperature         divides the logits; 0 takes the most probable token
    top_k               keep the k most probable tokens; 0 or -1 keeps all
    top_p               then the fewest tokens whose probabilities reach p together
    min_p               before both, drop tokens below min_p times the largest probability. Tokens tied with the last
                        one kept by top_k or top_p are kept too
    repetition_penalty  divides positive and multiplies negative logits of tokens seen in prompt or output
    frequency_penalty, presence_penalty
                        subtracted from a token's logit for each time, and once if, it is in the output
    logit_bias          added to the logits of these tokens
    allowed_token_ids   no other token is ever chosen
    seed                makes a request's samples its own: they depend neither on its batch nor on other requests
    stop                texts that end the output; they are cut off unless include_stop_str_in_output
    stop_token_ids      tokens that end the output, beside the model's own end tokens; kept in token_ids, not in text
    ignore_eos          the model's end tokens do not end the output
    max_tokens          None: as many as max_model_len allows
    min_tokens          no stop before this many tokens
    logprobs            that many most probable tokens at each position, and the chosen one; -1 for the whole
                        vocabulary. Natural logarithms of the model's own distribution, before anything above
    prompt_logprobs     the same at the positions of the prompt; the prefix cache is then not used for reading
    skip_special_tokens leave special tokens out of the text
    structured          the form that the output must have: no other token is ever chosen. End tokens and stop_token_ids
                        can come only where the form may end, and where it can only end, the output ends by itself,
                        also before min_tokens. An output that max_tokens or a stop text ends may be incomplete
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        self._check_types()
        _check(self.n >= 1, "n", self.n, "at least 1")
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "a number from 0")
        _check(self.top_k >= -1, "top_k", self.top_k, "at least 1, or 0 or -1 for all")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _check(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]")
        biases = dict(self.logit_bias or {})
        _check(all(map(math.isfinite, biases.values())), "logit_bias", biases, "a mapping to finite numbers")
        _check(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "not empty")
        _check(self.seed is None or -(2**62) <= self.seed < 2**62, "seed", self.seed, "in [-2**62, 2**62), or None")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1, or None")
        limit = math.inf if self.max_tokens is None else self.max_tokens
        _check(0 <= self.min_tokens <= limit, "min_tokens", self.min_tokens, f"in [0, max_tokens={self.max_tokens}]")
        _check(self.logprobs is None or self.logprobs >= -1, "logprobs", self.logprobs, "at least -1, or None")
        _check(
            self.prompt_logprobs is None or self.prompt_logprobs >= -1,
            "prompt_logprobs", self.prompt_logprobs, "at least -1, or None",
        )  # fmt: skip

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            optional = name in ("seed", "max_tokens", "logprobs", "prompt_logprobs") and value is None
            _check(optional or isinstance(value, int), name, value, "an integer")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            _check(isinstance(getattr(self, name), int | float), name, getattr(self, name), "a number")
        for name in ("allowed_token_ids", "stop_token_ids"):
            value = getattr(self, name)
            _check(value is None or isinstance(value, list | tuple), name, value, "a list of token ids, or None")
        form = self.structured
        _check(form is None or isinstance(form, StructuredOutput), "structured", form, "a StructuredOutput, or None")
        texts = self.stop is None or isinstance(self.stop, str | list | tuple)
        _check(
            texts and all(isinstance(s, str) and s for s in self.stops), "stop", self.stop, "texts that are not empty"
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever it was given as."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position. rank 1 is the most probable token."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One sample of a request; in a stream, what is new in it."""

    index: int
    token_ids: list[int]
    decoded: str | None  # None when there is no tokenizer
    cumulative_logprob: float | None = None  # of all tokens so far; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or text that ended it; None for the model's own end token

    @property
    def text(self) -> str:
        """The tokens as text; ValueError if the model has no tokenizer."""
        if self.decoded is None:
            raise ValueError("the model folder has no tokenizer, so there is no text; use token_ids")
        return self.decoded


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Moments of a request, in seconds of `time.perf_counter`."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A request and its samples. `error` says what went wrong with a request that ended with finish_reason "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first position has none: nothing precedes it
    num_cached_tokens: int = 0  # of the first sample's prompt, found in the prefix cache
    error: str | None = None
