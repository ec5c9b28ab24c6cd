"""Servers over real sockets, in a thread of the test's process, and a gate that holds their model still."""

import asyncio
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from anabranch import LLM
from anabranch.models.weights import save_model
from anabranch.serve.async_engine import AsyncEngine
from anabranch.serve.http.app import make_app
from anabranch.serve.http.listen import bind, url
from anabranch.serve.http.settings import ServerSettings
from anabranch.train.tokenizer import write_tokenizer

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ mood }}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Gate:
    """Stands before every pass through the model: `close` it, and steps wait until `open`."""

    def __init__(self, runner):
        self._forward = runner.forward
        self._is_open = threading.Event()
        self._is_open.set()
        self.failure = None
        runner.forward = self._pass

    def close(self):
        self._is_open.clear()

    def open(self):
        self._is_open.set()

    def _pass(self, step):
        assert self._is_open.wait(60)
        if self.failure is not None:
            raise self.failure
        return self._forward(step)


class Running:
    """A server that runs until `stop`."""

    def __init__(self, llm, *, send_buffer=None, **settings):
        self.llm = llm
        self.gate = Gate(llm.engine.runner)
        self.settings = ServerSettings(port=0, model_names=(NAME,), **settings)
        self.engine = AsyncEngine(llm.engine, max_queue=self.settings.max_queue)
        app = make_app(llm, self.engine, self.settings)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", backlog=512))
        self.listener = bind(self.settings)
        if send_buffer is not None:  # the kernel's for each connection
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = url(self.listener)
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])))
        self.thread.start()
        self.until(lambda: self.server.started)
        key = {} if self.settings.api_key is None else {"Authorization": f"Bearer {self.settings.api_key}"}
        self.client = httpx.Client(base_url=self.url, headers=key, timeout=60)

    def stop(self):
        self.gate.open()
        self.client.close()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(60)
        self.engine.halt()  # force_exit leaves out the end of the lifespan
        assert not self.thread.is_alive()

    def until(self, holds, limit_s=60):
        """Wait for something to become true."""
        end = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < end, "it never became true"
            time.sleep(0.002)

    def complete(self, prompt, expect=200, **fields):
        """POST /v1/completions; the answer's JSON."""
        return self.post("/v1/completions", {"prompt": prompt, **fields}, expect)

    def chat(self, messages, expect=200, **fields):
        return self.post("/v1/chat/completions", {"messages": messages, **fields}, expect)

    def post(self, path, body, expect=200):
        response = self.client.post(path, json=body)
        assert response.status_code == expect, response.text
        return response.json()

    @property
    def free_blocks(self):
        return self.llm.engine.scheduler.pool.num_free

    @property
    def all_blocks(self):
        return self.llm.engine.scheduler.pool.num_blocks

    @property
    def running(self):
        return len(self.llm.engine.scheduler.running)


@pytest.fixture(scope="session")
def folder(build, tmp_path_factory):
    """A byte model: random weights, a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    save_model(build(vocab_size=258, eos_ids=()), path)
    write_tokenizer(path, context=512)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def offline(folder):
    """The same model without a server."""
    return LLM(folder)


@pytest.fixture(scope="session")
def serve():
    """`serve(llm, api_key="k")`: a server until the end of the tests."""
    servers = []

    def run(llm, **settings):
        servers.append(Running(llm, **settings))
        return servers[-1]

    yield run
    for running in servers:
        running.stop()


@pytest.fixture(scope="session")
def server(folder, serve):
    """One server for all tests that leave it as it was."""
    return serve(LLM(folder))


@pytest.fixture
def start(folder):
    """`start(max_num_seqs=4, max_queue=2)`: a server of its own, for tests that break or fill it."""
    servers = []
    sizes = ("max_num_seqs", "max_model_len", "cache_bytes", "block_size", "max_num_batched_tokens")

    def run(**options):
        llm = LLM(folder, **{name: options.pop(name) for name in sizes if name in options})
        servers.append(Running(llm, **options))
        return servers[-1]

    yield run
    for running in servers:
        running.stop()


@pytest.fixture(scope="session")
def gate_of():
    """`gate_of(llm)`: a gate before its model."""
    return lambda llm: Gate(llm.engine.runner)
