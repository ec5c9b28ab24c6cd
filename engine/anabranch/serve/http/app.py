"""The routes. Everything that takes long happens in worker threads or in the engine's own: the loop only passes on."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from jinja2 import TemplateError
from starlette.types import ASGIApp

from anabranch.serve.adapters.library import LoadedAdapter, NamedAdapter
from anabranch.serve.async_engine import AsyncEngine, Job, TokenPrompt
from anabranch.serve.http import errors, metrics
from anabranch.serve.http.adapter_routes import AdapterRoutes
from anabranch.serve.http.answers import Answer, ChatAnswer, CompletionAnswer
from anabranch.serve.http.errors import ApiError, ErrorBody
from anabranch.serve.http.guards import Guards
from anabranch.serve.http.json_route import JsonRoute
from anabranch.serve.http.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from anabranch.serve.http.settings import ServerSettings
from anabranch.serve.http.sse import EventStream, unless_client_leaves
from anabranch.serve.http.token_texts import TokenTexts
from anabranch.serve.llm import LLM
from anabranch.serve.request import SamplingParams
from anabranch.version import __version__

SHOWN_NAMES = 20  # in an error
PLAYGROUND = Path(__file__).with_name("playground.html")
PLAYGROUND_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(llm: LLM, engine: AsyncEngine, settings: ServerSettings) -> ASGIApp:
    """The server as an ASGI app; its lifespan is the engine's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="anabranch", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(Api(llm, engine, settings).router())
    return Guards(app, settings, engine.traffic)


class Api:
    """The endpoints over one model."""

    def __init__(self, llm: LLM, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.llm = llm
        self.engine = engine
        self.settings = settings
        self.max_len = llm.engine.config.max_model_len
        self.texts = TokenTexts(llm.engine.tokenizer)
        self.adapters = AdapterRoutes(llm.adapters, settings)
        self.registry = metrics.make_registry(engine, llm.adapters)
        self.created = int(time.time())

    def router(self) -> APIRouter:
        fails: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
        router = APIRouter(route_class=JsonRoute, responses=fails)
        router.post("/v1/completions")(self.completions)
        router.post("/v1/chat/completions")(self.chat)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{name:path}")(self.model)
        self.adapters.add_to(router)
        router.post("/tokenize")(self.tokenize)
        router.post("/detokenize")(self.detokenize)
        router.get("/tokenizer_info")(self.tokenizer_info)
        router.get("/health")(self.health)
        router.get("/metrics")(self.metrics)
        router.get("/", include_in_schema=False)(self.playground)
        return router

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Continue texts or token ids."""
        name, adapter = self._check(body, body.logprobs)
        with _blame():
            params = body.params()

        def encode() -> list[TokenPrompt]:
            special = body.add_special_tokens
            lists = [self.llm.encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in body.prompt]
            loaded = self._open(adapter)
            return [TokenPrompt(ids, body.cache_salt, loaded) for ids in lists]

        def make_answer(prompts: list[TokenPrompt]) -> Answer:
            echoed = None
            if body.echo:
                pairs = zip(body.prompt, prompts, strict=True)
                echoed = [p if isinstance(p, str) else self._decode(t.ids, body.skip_special_tokens) for p, t in pairs]
            return CompletionAnswer(body, name, self.texts, echoed)

        return await self._run(request, body, params, len(body.prompt) * body.n, encode, make_answer)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        name, adapter = self._check(body, body.top_logprobs)
        with _blame():
            params = body.params()

        def encode() -> list[TokenPrompt]:
            return [TokenPrompt(self._render(body), body.cache_salt, self._open(adapter))]

        def make_answer(prompts: list[TokenPrompt]) -> Answer:
            return ChatAnswer(body, name, self.texts)

        return await self._run(request, body, params, body.n, encode, make_answer)

    async def models(self) -> Response:
        """The names of the model, and of the adapters over it."""
        names = [*self.settings.model_names, *self.adapters.names()]
        return _json({"object": "list", "data": [self._describe(name, self.adapters.find(name)) for name in names]})

    async def model(self, name: str) -> Response:
        """One of the names."""
        return _json(self._describe(*self._name(name)))

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        self._name(body.model)

        def encode() -> tuple[list[int], list[str] | None]:
            if body.prompt is None:
                ids = self._render(body)
            else:
                ids = self.llm.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
            return ids, [self.texts.name(token) for token in ids] if body.return_token_strs else None

        with _blame():
            ids, strings = await self.engine.in_worker(encode)
        return _json({"count": len(ids), "max_model_len": self.max_len, "tokens": ids, "token_strs": strings})

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        self._name(body.model)
        vocab = self.llm.engine.vocab_size
        if self.llm.tokenizer is None:
            raise ApiError(400, "the model folder has no tokenizer: there is no text")
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < vocab:
            raise ApiError(400, f"token ids must be in [0, {vocab})", param="tokens")
        return _json({"prompt": await self.engine.in_worker(self._decode, body.tokens, False)})

    async def tokenizer_info(self) -> Response:
        """What a client needs to know to use the tokenizer from afar."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ApiError(404, "the model folder has no tokenizer")
        special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
        return _json({
            "tokenizer_class": type(tokenizer).__name__, "vocab_size": len(tokenizer),
            "model_max_length": self.max_len, "chat_template": tokenizer.chat_template, **special,
        })  # fmt: skip

    async def health(self) -> Response:
        """200 while requests are answered, 503 with a reason otherwise."""
        reason = self.engine.broken
        if reason is None:
            return _json({"status": "ok"})
        return _json({"status": "unavailable", "reason": reason}, status=503)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(metrics.expose(self.registry), media_type=metrics.CONTENT_TYPE)

    async def playground(self) -> Response:
        """A page to try the model, if the installation has one."""
        if not PLAYGROUND.is_file():
            raise ApiError(404, "there is no page here; the API is at /v1")
        headers = {"Content-Security-Policy": PLAYGROUND_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(PLAYGROUND.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    async def _run(
        self,
        request: Request,
        body: Sampling,
        params: SamplingParams,
        samples: int,
        encode: Callable[[], list[TokenPrompt]],
        make_answer: Callable[[list[TokenPrompt]], Answer],
    ) -> Response:
        with _blame():
            job = self.engine.admit(samples)
        try:
            answer = await self._start(job, params, encode, make_answer, stream=body.stream)
        except BaseException:
            job.close()
            raise
        if body.stream:
            return EventStream(answer.events(job), close=job.close, timeout_s=self.settings.client_timeout_s)
        try:
            return await unless_client_leaves(self._whole(job, answer), request)
        finally:
            job.close()

    async def _start(
        self,
        job: Job,
        params: SamplingParams,
        encode: Callable[[], list[TokenPrompt]],
        make_answer: Callable[[list[TokenPrompt]], Answer],
        *,
        stream: bool,
    ) -> Answer:
        with _blame():
            prompts = await self.engine.in_worker(encode)
            self._check_lengths(prompts)
            answer = await self.engine.in_worker(make_answer, prompts)
            await job.start(prompts, params, stream=stream)
        return answer

    async def _whole(self, job: Job, answer: Answer) -> Response:
        outputs = await answer.body(job)
        body = await self.engine.in_worker(answer.build, outputs) if answer.heavy else answer.build(outputs)
        return Response(body, media_type="application/json")

    def _check(self, body: Sampling, logprobs: int | None) -> tuple[str, NamedAdapter | None]:
        """What the request's model is; from here on it stays so, whatever is unloaded meanwhile."""
        found = self._name(body.model)
        if (logprobs or 0) > self.settings.max_logprobs:
            raise ApiError(
                400, f"at most {self.settings.max_logprobs} log-probabilities per token are allowed, got {logprobs}",
                param="logprobs",
            )  # fmt: skip
        return found

    def _check_lengths(self, prompts: Sequence[TokenPrompt]) -> None:
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest >= self.max_len:
            raise ApiError(
                400, f"the prompt has {longest} tokens, and the context of {self.max_len} must hold an output too",
                code="context_length_exceeded",
            )  # fmt: skip

    def _name(self, asked: str | None) -> tuple[str, NamedAdapter | None]:
        names = self.settings.model_names
        if asked is None or asked in names:
            return asked or names[0], None
        adapter = self.adapters.find(asked)
        if adapter is None:
            choices = [*names, *self.adapters.names()][:SHOWN_NAMES]
            raise ApiError(
                404, f"the model {asked!r} is not here; choose {' or '.join(map(repr, choices))}",
                param="model", code="model_not_found",
            )  # fmt: skip
        return asked, adapter

    def _open(self, adapter: NamedAdapter | None) -> LoadedAdapter | None:
        return None if adapter is None or self.llm.adapters is None else self.llm.adapters.open(adapter)

    def _describe(self, name: str, adapter: NamedAdapter | None) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "anabranch",
            "max_model_len": self.max_len, **({} if adapter is None else self.adapters.describe(adapter)),
        }  # fmt: skip

    def _render(self, body: ChatRequest | TokenizeRequest) -> list[int]:
        try:
            return self.llm.encode_chat(
                [message.plain() for message in body.messages or ()],
                add_generation_prompt=body.add_generation_prompt,
                template_values=body.chat_template_kwargs,
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        tokenizer = self.llm.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@contextmanager
def _blame() -> Iterator[None]:
    """A ValueError inside is the client's fault; what needs a library that is not installed cannot be had either."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise ApiError(400, str(error)) from None


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
