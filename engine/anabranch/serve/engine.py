"""The engine: requests in, tokens and text out, one step at a time.

    add_request -> [scheduler] -> step: runner, sampler -> text, stops -> RequestOutput

One thread calls `step`; any thread may add and abort requests meanwhile, for the lock is not held while the model
computes. An aborted request's blocks are free at once: the running step may still write to them, but nobody else gets
them before it is over.

A request that fails (its logits are not numbers, its text cannot be decoded, no token fits its structured output) ends
with finish_reason "error" and harms no other. When the model itself raises, every request of that step ends so, and the
engine goes on.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from anabranch.models.transformer import Transformer
from anabranch.serve.adapters.arena import AdapterArena
from anabranch.serve.adapters.library import LoadedAdapter
from anabranch.serve.adapters.slots import AdapterSlots
from anabranch.serve.blocks import BlockPool
from anabranch.serve.grammar import Grammar, Grammars
from anabranch.serve.request import RequestMetrics, RequestOutput, SamplingParams
from anabranch.serve.runner import Runner
from anabranch.serve.sample import Request, Sample, extend_prompt_logprobs
from anabranch.serve.sampler import Candidate, Draw, Sampler, top_logprobs
from anabranch.serve.scheduler import Scheduler, Step
from anabranch.serve.text import TextStream

if TYPE_CHECKING:
    from anabranch.serve.tensor_parallel import Workers

PROMPT_ROWS = 64  # positions whose logits exist at once while prompt_logprobs are computed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    num_blocks, block_size  the cache: so many blocks of so many tokens
    max_model_len           tokens of a sequence, prompt and output together
    max_num_seqs            sequences that run at once
    max_num_batched_tokens  tokens of one step; longer prompts are computed in chunks
    cache_dtype             of keys and values in the cache
    enable_prefix_caching   find the blocks of earlier prompts again
    seed                    of the requests that have none of their own
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cache_dtype: torch.dtype
    enable_prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, a prompt and an output, got {self.max_model_len}")


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; `tokenizers.Tokenizer` has it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def to_str(self) -> str: ...


@dataclass(slots=True)
class EngineStats:
    """Sums since the engine was made; only `step` writes them.

    sampled_tokens  output tokens, of which first_tokens were the first of their sample
    failed_steps    steps in a row that the model did not survive, up to now
    """

    steps: int = 0
    sampled_tokens: int = 0
    first_tokens: int = 0
    failed_steps: int = 0


@dataclass(slots=True)
class Computed:
    """What a step has found, before any of it is given to the requests."""

    samples: list[Sample]
    tokens: list[int]
    logprobs: dict[int, list[Candidate]]  # by index into `samples`
    prompt_logprobs: list[tuple[Request, list[list[Candidate]]]]


class Engine:
    """Runs many requests together over one model. See the module's text for threads and failures.

    workers   the other ranks, if `model` is rank 0's part of one
    adapters  where the adapters of requests lie; None: no request may have one
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        workers: "Workers | None" = None,
        adapters: AdapterArena | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = model.config.vocab_size
        self.eos_ids = frozenset(model.config.eos_ids)
        self.adapter_slots = None if adapters is None else AdapterSlots(adapters.ranks)
        self.scheduler: Scheduler[Sample] = Scheduler(
            BlockPool(config.num_blocks), block_size=config.block_size, max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens, share_prefixes=config.enable_prefix_caching,
            adapters=self.adapter_slots,
        )  # fmt: skip
        self.runner = Runner(
            model, num_blocks=config.num_blocks, block_size=config.block_size, max_num_seqs=config.max_num_seqs,
            max_len=config.max_model_len, dtype=config.cache_dtype, workers=workers,
            adapters=adapters,
        )  # fmt: skip
        self.sampler = Sampler()
        self.stats = EngineStats()
        self.grammars = None if tokenizer is None else Grammars(tokenizer, self.vocab_size, self.eos_ids)
        self._requests: dict[str, Request] = {}
        self._lock = Lock()
        self._seeds = torch.Generator().manual_seed(config.seed)
        self._token_texts: dict[int, str] = {}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        cache_salt: str = "",
        adapter: LoadedAdapter | None = None,
        stream: bool = False,
    ) -> None:
        """Queue a request. ValueError, with nothing queued, if it can never run.

        A structured output is compiled here, in the caller's thread, unless it is one of the last that were (see
        `Grammars.compile` for how long that takes); running requests go on meanwhile.

        prompt      the text of the tokens, only to be returned with the outputs
        cache_salt  requests with different salts never share cached blocks
        adapter     what the model's layers add for this request, which holds it to its end
        stream      report each step's new tokens and text; otherwise one output comes when all samples have ended
        """
        ids = list(prompt_token_ids)
        max_len = self.check(ids, params)
        self._check_adapter(adapter)
        grammar = self._grammar(params)
        request = Request(
            request_id=request_id, prompt=prompt, prompt_token_ids=ids, params=params, stream=stream,
            metrics=RequestMetrics(arrival_s=time.perf_counter()),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )  # fmt: skip
        with self._lock:
            if request_id in self._requests:
                raise ValueError(f"request_id {request_id!r} is already in use")
            request.samples = [
                self._sample(request, index, max_len, cache_salt, adapter, grammar) for index in range(params.n)
            ]
            self._requests[request_id] = request
            for sample in request.samples:
                self.scheduler.add(sample)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The number of tokens at which such a request ends; ValueError if it can never run."""
        vocab, length, limit = self.vocab_size, len(prompt_token_ids), self.config.max_model_len
        if not length:
            raise ValueError("the prompt is empty: at least one token is needed")
        _check_ids("prompt", prompt_token_ids, vocab)
        _check_ids("logit_bias", params.logit_bias or (), vocab)
        _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab)
        _check_ids("stop_token_ids", params.stop_token_ids or (), vocab)
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens; max_model_len={limit} leaves room for {limit - 1}")
        if params.stops and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and the model folder has none; use stop_token_ids")
        max_len = limit if params.max_tokens is None else min(limit, length + params.max_tokens)
        self.scheduler.check(length, max_len)
        self._grammar(params)
        return max_len

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not (or no longer) there. No output comes."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._drop(request)
            return request is not None

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompts."""
        with self._lock:
            self.scheduler.pool.forget(range(self.config.num_blocks))

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Advance every running request; returns what is new in streams, and requests that have ended."""
        with self._lock:
            step = self.scheduler.schedule()
        if not step.sequences:
            return []
        self.stats.steps += 1
        try:
            computed = self._compute(step)
        except BaseException as error:  # an interrupt, too, leaves half a step behind
            with self._lock:
                self.stats.failed_steps += 1
                requests = dict.fromkeys(sample.request for sample in step.sequences if sample.row >= 0)
                failed = [self._fail(request, error) for request in requests]
                self.scheduler.discard(step)
            if isinstance(error, Exception):
                return failed
            raise
        with self._lock:
            self.stats.failed_steps = 0
            self.scheduler.complete(step)
            return self._advance(computed)

    def _compute(self, step: Step[Sample]) -> Computed:
        hidden = self.runner.forward(step)
        samples, rows, end = [], [], 0
        asked = []
        for sample, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            if sample.request.prompt_logprobs is not None and sample.index == 0:
                asked.append((sample, start, range(end, end + count)))
            end += count
            if start + count == len(sample.tokens):
                samples.append(sample)
                rows.append(end - 1)
        prompt_logprobs = [
            (sample.request, self._score_prompt(sample, start, hidden, where)) for sample, start, where in asked
        ]
        if not samples:
            return Computed(samples, [], {}, prompt_logprobs)
        tokens, logprobs = self.sampler(self.runner.logits(hidden, rows), [sample.draw for sample in samples])
        return Computed(samples, tokens, logprobs, prompt_logprobs)

    def _score_prompt(self, sample: Sample, start: int, hidden: Tensor, rows: range) -> list[list[Candidate]]:
        """Candidates at the prompt's positions that are still missing and that a step predicts in some rows."""
        done = len(sample.request.prompt_logprobs or ())
        ids, count = sample.request.prompt_token_ids, sample.request.params.prompt_logprobs or 0
        first, last = done - 1, min(start + len(rows), len(ids) - 1)  # position p predicts token p + 1
        found = []
        for low in range(first, last, PROMPT_ROWS):
            high = min(low + PROMPT_ROWS, last)
            logits = self.runner.logits(hidden, rows[low - start : high - start])
            found += top_logprobs(logits, ids[low + 1 : high + 1], [count] * (high - low))
        return found

    def _advance(self, computed: Computed) -> list[RequestOutput]:
        now = time.perf_counter()
        outputs = []
        reports: dict[Request, list[Sample]] = {}
        for request, found in computed.prompt_logprobs:
            extend_prompt_logprobs(request, found, self._token_text)
        for index, (sample, token) in enumerate(zip(computed.samples, computed.tokens, strict=True)):
            if sample.row < 0:  # aborted while the step ran, or failed with another sample of its request
                continue
            request = sample.request
            try:
                sample.advance(token, computed.logprobs.get(index), self._token_text)
            except Exception as error:
                outputs.append(self._fail(request, error))
                reports.pop(request, None)
                continue
            self.stats.sampled_tokens += 1
            self.stats.first_tokens += len(sample.tokens) == len(request.prompt_token_ids) + 1
            if request.metrics.first_token_s is None:
                request.metrics.first_token_s = now
            if sample.finish_reason is not None:
                self.scheduler.finish(sample)
                if request.finished:
                    request.metrics.finished_s = now
                    del self._requests[request.request_id]
                    reports.setdefault(request, [])
            if request.stream:
                reports.setdefault(request, []).append(sample)
        return outputs + [
            request.report(new if request.stream else request.samples) for request, new in reports.items()
        ]

    def _check_adapter(self, adapter: LoadedAdapter | None) -> None:
        if adapter is None:
            return
        if self.adapter_slots is None:
            raise ValueError("this engine has no room for adapters")
        if adapter.ranks > self.adapter_slots.ranks:
            raise ValueError(f"the adapter has {adapter.ranks} ranks, there is room for {self.adapter_slots.ranks}")

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.structured is None:
            return None
        if self.grammars is None:
            raise ValueError("structured output needs a tokenizer, and the model folder has none")
        return self.grammars.compile(params.structured)

    def _sample(
        self,
        request: Request,
        index: int,
        max_len: int,
        salt: str,
        adapter: LoadedAdapter | None,
        grammar: Grammar | None,
    ) -> Sample:
        params = request.params
        silent = frozenset() if params.ignore_eos else self.eos_ids
        stop_ids = silent | frozenset(params.stop_token_ids or ())
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
        text = None
        if self.tokenizer is not None:
            decode = partial(self.tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
            context, keep = request.prompt_token_ids, params.include_stop_str_in_output
            text = TextStream(decode, context, params.stops, keep=keep)
        matcher = None if grammar is None else grammar.matcher()
        draw = Draw(params, request.prompt_token_ids, sorted(stop_ids), seed + index, matcher)
        return Sample(
            tokens=list(request.prompt_token_ids), max_len=max_len, salt=salt, adapter=adapter,
            reuse=params.prompt_logprobs is None or index > 0,
            request=request, index=index, draw=draw, stop_ids=stop_ids, silent_ids=silent, text=text,
            logprobs=None if params.logprobs is None else [],
        )  # fmt: skip

    def _fail(self, request: Request, error: BaseException) -> RequestOutput:
        request.error = f"{type(error).__name__}: {error}"
        self._drop(request)
        for sample in request.samples:
            sample.finish_reason = sample.finish_reason or "error"
        request.metrics.finished_s = time.perf_counter()
        return request.report(request.samples)

    def _drop(self, request: Request) -> None:
        del self._requests[request.request_id]
        for sample in request.samples:
            self.scheduler.finish(sample)

    def _token_text(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return text


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    wrong = [token for token in ids if not (isinstance(token, int) and 0 <= token < vocab_size)]
    if wrong:
        raise ValueError(f"token ids in {name} must be integers in [0, {vocab_size}), got {wrong[0]!r}")
