"""`LLM`: a model folder in one object, with vLLM's methods for many prompts, chats and streams."""

import operator
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from tqdm import tqdm

from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.weights import load_model
from anabranch.serve.adapters.library import AdapterLibrary, LoadedAdapter
from anabranch.serve.adapters.opening import open_adapters
from anabranch.serve.engine import Engine, EngineConfig
from anabranch.serve.memory import size_cache
from anabranch.serve.request import CompletionOutput, RequestOutput, SamplingParams
from anabranch.serve.tensor_parallel import Workers

Prompt = str | Sequence[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]
AdapterNames = str | Sequence[str | None] | None
DTYPES = {
    "float32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "half": torch.float16,
}  # fmt: skip
STEP_TOKENS = {"cpu": 512}  # a chunk large enough for matrix products to reach full speed
STEP_TOKENS_GPU = 2048
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
BAR_DELAY_S = 1.0  # a progress bar appears when a batch takes longer
ADAPTER_HOST_BYTES = 1 << 30


class RequestError(RuntimeError):
    """Some requests failed while they ran. `outputs` has all of them, also those that succeeded."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        failed = [output for output in outputs if output.error is not None]
        super().__init__(f"{len(failed)} of {len(outputs)} requests failed; the first: {failed[0].error}")
        self.outputs = outputs


@dataclass(frozen=True, slots=True)
class _Parsed:
    text: str | None
    ids: list[int]
    salt: str = ""


class LLM:
    """Generates from a model folder: config.json, safetensors and, for text, a tokenizer.

    model                   the folder
    tokenizer               another folder to take the tokenizer from
    dtype                   "auto" (as stored), "float32", "bfloat16", "float16", or a torch.dtype
    device                  "auto" (a GPU if there is one) or a torch device
    max_model_len           tokens of a sequence, prompt and output together; None: the model's positions, or fewer if
                            the cache cannot hold as many
    cache_bytes             memory for keys and values, on each rank; None: half of what is free (85 % on a GPU), but
                            never more than max_num_seqs sequences of max_model_len can use
    cache_dtype             "auto" (as the weights) or "int8", which holds almost twice as much as bfloat16
    max_num_seqs            sequences that run at once
    max_num_batched_tokens  tokens of one step; a longer prompt is computed in chunks, between which others advance
    enable_prefix_caching   compute what prompts have in common at their start only once
    block_size              tokens of a cache block, the unit of that sharing
    seed                    of requests that bring none
    tensor_parallel_size    processes that share the model, this one among them; each holds some of the heads and some
                            of each matrix. On GPUs rank r takes GPU r; on a CPU they divide torch's threads, and this
                            process keeps its share. `close` ends the others, as does collecting this object
    adapters                folders of adapters by the names that requests give (as PEFT saves LoRA, or as the tune
                            command saves the kinds that PEFT has not); more can be loaded and unloaded at any time. {}
                            for none at first; None for none ever, which is faster by nothing but their memory
    adapter_bytes           memory for the adapters that run, on the model's device; None: a tenth of what is free, but
                            no more than 256 adapters of rank 64 need
    adapter_host_bytes      memory for the adapters used last, from which they come to the device without a disk; those
                            of waiting and running requests stay in memory whatever this says

    Raises ValueError for a folder, a setting or a request that cannot work, before anything runs.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_model_len: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: str = "auto",
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        block_size: int = 64,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        adapters: Mapping[str, str | Path] | None = None,
        adapter_bytes: int | None = None,
        adapter_host_bytes: int = ADAPTER_HOST_BYTES,
    ) -> None:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{str(model)!r} is not a model folder: it has no config.json. Models are read from disk; to fetch "
                "one: hf download ORGANISATION/NAME --local-dir FOLDER"
            )
        if cache_dtype not in ("auto", "int8"):
            raise ValueError(f"cache_dtype must be 'auto' or 'int8', got {cache_dtype!r}")
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        if tensor_parallel_size > 1 and adapters is not None:
            raise ValueError(f"adapters run on one rank only, got tensor_parallel_size={tensor_parallel_size}")
        where, weights = _pick_device(device), _pick_dtype(dtype)
        self.tokenizer = load_tokenizer(folder if tokenizer is None else Path(tokenizer))
        if self.tokenizer is None and tokenizer is not None:
            raise ValueError(f"there is no tokenizer in {str(tokenizer)!r}")
        self.adapters: AdapterLibrary | None = None
        self._workers: Workers | None = None
        if tensor_parallel_size > 1:
            self._workers = Workers(folder, tensor_parallel_size, dtype=weights, device=where)
            where = self._workers.device
        try:
            network = load_model(
                folder, dtype=weights, device=where, group=None if self._workers is None else self._workers.group
            )
            arena = None
            if adapters is not None:
                self.adapters, arena = open_adapters(
                    network, adapters, device_bytes=adapter_bytes, host_bytes=adapter_host_bytes
                )
            budget = None if self._workers is None else self._workers.join()
            stored = torch.int8 if cache_dtype == "int8" else network.embed.dtype
            num_blocks, length = size_cache(
                network.shard.whole, dtype=stored, block_size=block_size, max_num_seqs=max_num_seqs,
                max_model_len=max_model_len, cache_bytes=budget if cache_bytes is None else cache_bytes, device=where,
                ranks=tensor_parallel_size,
            )  # fmt: skip
            if max_num_batched_tokens is None:
                max_num_batched_tokens = max(STEP_TOKENS.get(where.type, STEP_TOKENS_GPU), max_num_seqs)
            config = EngineConfig(
                num_blocks=num_blocks, block_size=block_size, max_model_len=length, max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens, cache_dtype=stored,
                enable_prefix_caching=enable_prefix_caching, seed=seed,
            )  # fmt: skip
            backend = None if self.tokenizer is None else self.tokenizer.backend_tokenizer
            self.engine = Engine(network, backend, config, workers=self._workers, adapters=arena)
            if self._workers is not None:
                self._workers.start(num_blocks, block_size, stored)
        except BaseException:
            self.close()
            raise
        self._numbers = count()
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._driving = Lock()

    def close(self) -> None:
        """End the processes of other ranks, if there are any; nothing can be generated afterwards."""
        if self._workers is not None:
            self._workers.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterNames = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many; outputs come in the order of the prompts.

        prompts          a text, token ids, or {"prompt": text} or {"prompt_token_ids": ids} with an optional
                         "cache_salt"; or a sequence of such
        sampling_params  one for all, or one for each
        adapter          the name of one for all, or one for each; None for the model alone
        use_tqdm         a progress bar; None shows it on a terminal when the batch takes longer than a second

        Raises ValueError, before anything runs, for a request that cannot work, and RequestError, when all others are
        done, if one fails while it runs.
        """
        listed: list[Any] = [prompts] if _is_single(prompts) else list(prompts)
        parsed = [self._parse(prompt, f"prompts[{index}]") for index, prompt in enumerate(listed)]
        return self._run(parsed, sampling_params, adapter, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterNames = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, [{"role": "user", "content": "..."}, ...], by the model's chat template.

        All else as in `generate`.
        """
        listed: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return self._run([self._render(conversation) for conversation in listed], sampling_params, adapter, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[CompletionOutput]:
        """Continue one prompt; yields what is new in each sample (see `index`) as it comes.

        The last part of a sample has its finish_reason. A stream that is closed early frees its blocks at once.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        parsed = self._parse(prompt, "prompt")
        self.engine.check(parsed.ids, params)  # now, not at the first next()
        (loaded,) = self._open(adapter, 1)
        return self._stream(parsed, params, loaded)

    def load_adapter(self, name: str, folder: str | Path, *, replace: bool = False) -> None:
        """Read an adapter, so that requests can name it from now on; from any thread, while others generate.

        replace   the name may be taken: running requests keep the adapter they have, new ones get this

        Raises ValueError for a name that is taken, a folder that cannot be served and more ranks than there is room
        for.
        """
        self._library().load(name, folder, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter's name; requests that have it go on. ValueError if it is not there."""
        self._library().unload(name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it."""
        return self._tokenize(text, special=add_special_tokens)

    def encode_chat(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool = True,
        template_values: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, up to where the answer starts.

        add_generation_prompt  end with what begins an answer
        template_values        further variables of the template, such as Qwen3's enable_thinking
        """
        return self._render(conversation, add_generation_prompt, template_values).ids

    def reset_prefix_cache(self) -> None:
        """Forget the blocks of earlier prompts."""
        self.engine.reset_prefix_cache()

    def _run(
        self,
        prompts: list[_Parsed],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: AdapterNames,
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        adapters = self._open(adapter, len(prompts))
        for index, (prompt, rules) in enumerate(zip(prompts, params, strict=True)):
            try:
                self.engine.check(prompt.ids, rules)
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
        inbox: deque[RequestOutput] = deque()
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        start, tokens = time.perf_counter(), 0
        try:
            for prompt, rules, loaded in zip(prompts, params, adapters, strict=True):
                ids.append(self._add(prompt, rules, loaded, inbox, stream=False))
            with _progress(len(ids), use_tqdm) as bar:
                while len(done) < len(ids):
                    for output in self._receive(inbox):
                        done[output.request_id] = output
                        tokens += sum(len(sample.token_ids) for sample in output.outputs)
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                        bar.update()
        finally:
            self._forget(ids)
        outputs = [done[request_id] for request_id in ids]
        if any(output.error is not None for output in outputs):
            raise RequestError(outputs)
        return outputs

    def _stream(
        self, prompt: _Parsed, params: SamplingParams, adapter: LoadedAdapter | None
    ) -> Iterator[CompletionOutput]:
        inbox: deque[RequestOutput] = deque()
        request_id = self._add(prompt, params, adapter, inbox, stream=True)
        try:
            finished = False
            while not finished:
                for output in self._receive(inbox):
                    if output.error is not None:
                        raise RequestError([output])
                    yield from output.outputs
                    finished = output.finished
        finally:
            self._forget([request_id])

    def _library(self) -> AdapterLibrary:
        if self.adapters is None:
            raise ValueError("this model serves no adapters: it was made without the argument `adapters`")
        return self.adapters

    def _open(self, names: AdapterNames, count: int) -> list[LoadedAdapter | None]:
        """The adapter of each prompt, in memory."""
        listed = [names] * count if names is None or isinstance(names, str) else list(names)
        if len(listed) != count:
            raise ValueError(f"adapter must be one name, or one for each of {count} prompts, got {len(listed)}")
        opened: dict[str | None, LoadedAdapter | None] = {None: None}
        for name in listed:
            if name is not None and name not in opened:
                opened[name] = self._library().open(self._library().find(name))
        return [opened[name] for name in listed]

    def _add(
        self,
        prompt: _Parsed,
        params: SamplingParams,
        adapter: LoadedAdapter | None,
        inbox: deque[RequestOutput],
        *,
        stream: bool,
    ) -> str:
        request_id = str(next(self._numbers))
        self._inboxes[request_id] = inbox
        self.engine.add_request(
            request_id, prompt.ids, params, prompt=prompt.text, cache_salt=prompt.salt, adapter=adapter, stream=stream
        )
        return request_id

    def _receive(self, inbox: deque[RequestOutput]) -> Iterator[RequestOutput]:
        """What has come for an inbox. Streams and batches of several callers share every step."""
        with self._driving:
            if not inbox:
                for output in self.engine.step():
                    self._inboxes[output.request_id].append(output)
        while inbox:
            yield inbox.popleft()

    def _forget(self, request_ids: list[str]) -> None:
        with self._driving:
            for request_id in request_ids:
                self.engine.abort(request_id)
                del self._inboxes[request_id]

    def _parse(self, prompt: Prompt, name: str) -> _Parsed:
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - set(PROMPT_KEYS))
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise ValueError(
                    f"{name} must have either 'prompt' or 'prompt_token_ids', and may have 'cache_salt'; "
                    f"got {sorted(prompt)}"
                )
            inner = self._parse(prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"], name)
            return _Parsed(inner.text, inner.ids, str(prompt.get("cache_salt", "")))
        if isinstance(prompt, str):
            return _Parsed(prompt, self.encode(prompt))
        try:
            return _Parsed(None, [operator.index(token) for token in prompt])
        except TypeError:
            raise ValueError(
                f"{name} must be a text, a list of token ids, or a dictionary with one of them, got {prompt!r}"
            ) from None

    def _render(
        self, conversation: Conversation, begin: bool = True, values: Mapping[str, Any] | None = None
    ) -> _Parsed:
        if self.tokenizer is None:
            raise ValueError(
                "the model folder has no tokenizer, so it has no chat template; give token ids to generate"
            )
        if not self.tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template; use generate with a text")
        taken = sorted(set(signature(self.tokenizer.apply_chat_template).parameters) & set(values or ()))
        if taken:
            raise ValueError(f"values of a chat template cannot be named {taken}")
        text = self.tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=begin, **dict(values or {})
        )
        return _Parsed(text, self._tokenize(text, special=False))

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer: give prompts as lists of token ids")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids


def _is_single(prompts: Any) -> bool:
    if isinstance(prompts, str | Mapping):
        return True
    return len(prompts) > 0 and all(hasattr(token, "__index__") for token in prompts)


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Mapping) or not all(isinstance(one, SamplingParams) for one in params):
        raise ValueError(f"sampling_params must be SamplingParams, or a list of them, got {params!r}")
    if len(params) != count:
        raise ValueError(f"sampling_params must be one, or one for each of {count} prompts, got {len(params)}")
    return list(params)


def _pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto' or a device that torch knows, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU here")
    return chosen


def _pick_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _progress(total: int, use_tqdm: bool | None) -> "tqdm[Any]":
    return tqdm(
        total=total,
        unit="request",
        dynamic_ncols=True,
        disable=None if use_tqdm is None else not use_tqdm,
        delay=BAR_DELAY_S if use_tqdm is None else 0,
    )
