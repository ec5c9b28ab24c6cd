"""The requests: their fields, their limits, and the sampling parameters they come down to.

A field that is null counts as not given: clients send null for what their user left out. Fields that clients send
habitually and that change no token are ignored (IGNORED). Fields that would change the answer in a way this server
cannot are refused unless they hold a value that asks for nothing (NEUTRAL), and so are fields that nobody knows.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator

from anabranch.serve.request import SamplingParams
from anabranch.serve.structured import from_response_format

MAX_N = 128
MAX_PROMPTS = 2048
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP = 1024  # characters of one
MAX_LIST = 1024  # token ids in stop_token_ids, entries of logit_bias
MAX_DEPTH = 32  # of objects and lists inside a field
LONG_LISTS = ("prompt", "tokens")  # whose types are checked to the bottom anyway
IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier",
))  # fmt: skip
NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "audio": (), "modalities": (["text"],), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": (), "suffix": ("",), "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (), "spaces_between_special_tokens": (True,), "priority": (0,), "lora_request": (),
    "tool_calls": ([],), "refusal": (), "annotations": ([],), "reasoning_content": ("",),
}  # fmt: skip

TokenIds = Annotated[list[int], Field(max_length=MAX_LIST)]


def read_prompts(value: object) -> list[str | list[int]]:
    """One prompt or many, each a text or token ids, as a list. By hand: pydantic would try every form on every id."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed, got {len(value)}")
        if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists; none empty")


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}, "minItems": 1},
    ]
}
Prompts = Annotated[list[str | list[int]], PlainValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)]


def read_stops(value: object) -> list[str]:
    """One stop text or some, as a list."""
    stops = [value] if isinstance(value, str) else value
    if (
        isinstance(stops, list)
        and len(stops) <= MAX_STOPS
        and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops)
    ):
        return stops
    raise ValueError(f"must be a text or at most {MAX_STOPS} texts, each of 1 to {MAX_STOP} characters")


STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP},
        {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}
Stops = Annotated[list[str], PlainValidator(read_stops), WithJsonSchema(STOP_SCHEMA)]


class Body(BaseModel):
    """Strict about types: "1" is no number and 1 is no text."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if given is None or name in IGNORED:
                continue
            if name not in LONG_LISTS:
                check_depth(name, given)
            if name not in cls.model_fields and name in NEUTRAL:
                if given not in NEUTRAL[name]:
                    raise ValueError(f"{name!r} is not supported by this server, got {_brief(given)}")
                continue
            kept[name] = given
        return kept


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against listeners: only a proxy that encrypts needs it


class Sampling(Body):
    """What completions and chats share. Names and meanings are OpenAI's, and vLLM's for what OpenAI does not have."""

    model: Annotated[str, StringConstraints(max_length=1024)] | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)  # further out logits overflow
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_LIST)
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    seed: int | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field("", max_length=1024)
    return_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # vLLM's: a regex, a choice, ...

    @model_validator(mode="after")
    def _check_together(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are allowed only with stream=true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs exclude one another")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """ValueError names what the engine cannot do."""
        form = self.response_format or self.structured_outputs
        return SamplingParams(
            n=self.n, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty, logit_bias=_read_bias(self.logit_bias),
            allowed_token_ids=self.allowed_token_ids, seed=self.seed, stop=self.stop,
            stop_token_ids=self.stop_token_ids, include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos, max_tokens=max_tokens, min_tokens=self.min_tokens, logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, skip_special_tokens=self.skip_special_tokens,
            structured=None if form is None else from_response_format(form),
        )  # fmt: skip


class CompletionRequest(Sampling):
    """Of /v1/completions."""

    prompt: Prompts
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of must be equal to n, got best_of={self.best_of} and n={self.n}")
        return self

    def params(self) -> SamplingParams:
        scored = self.logprobs if self.echo else None
        tokens = max(self.max_tokens, 1)  # the token of max_tokens=0 is not shown
        return self.sampling_params(max_tokens=tokens, logprobs=self.logprobs, prompt_logprobs=scored)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_LIST)]
    name: Annotated[str, StringConstraints(max_length=1024)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it: text parts become one text, a line each."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **name}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Sampling):
    """Of /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are allowed only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit, and they differ")
        return self

    def params(self) -> SamplingParams:
        tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(max_tokens=tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(Body):
    """Of /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # None: for a text yes, for a conversation, whose template has them, no
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for texts: a conversation's template has them")
        return self


class DetokenizeRequest(Body):
    """Of /detokenize."""

    model: str | None = None
    tokens: list[int]


AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class LoadAdapterRequest(Body):
    """Of /v1/load_lora_adapter. A path that is not absolute begins at the root of adapters."""

    lora_name: AdapterName
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool = False  # the name may be taken: new requests get this adapter


class UnloadAdapterRequest(Body):
    """Of /v1/unload_lora_adapter."""

    lora_name: AdapterName


def check_depth(name: str, value: object) -> None:
    """ValueError for a value with too many levels, which would overflow the stack of whoever walks through it."""
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{name} has more than {MAX_DEPTH} levels")


def _read_bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    wrong = [token for token in bias if not (token.isascii() and token.isdecimal() and len(token) < 10)]
    if wrong:
        raise ValueError(f"the keys of logit_bias must be token ids, got {wrong[0][:40]!r}")
    return {int(token): value for token, value in bias.items()}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
