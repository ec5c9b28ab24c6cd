"""Clients that leave, clients that do not read, and many at once."""

import asyncio
import json
import socket

import httpx
import pytest

from anabranch import SamplingParams


def open_stream(server, body, *, receive_buffer=None):
    """A connection that has asked for a stream and reads nothing yet."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(server.address)
    raw = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + raw)
    return connection


def read_texts(connection):
    """The rest of a chunked answer: text by choice."""
    raw = b""
    while piece := connection.recv(1 << 20):
        raw += piece
    _, _, chunks = raw.partition(b"\r\n\r\n")
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        body, chunks = body + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    lines = [line[6:] for line in body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    texts = {}
    for choice in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_blocks_before_the_step_is_over(start, stream):
    server = start()
    server.gate.close()
    connection = open_stream(server, {"prompt": ["a" * 100, "b" * 200], "n": 3, "max_tokens": 200, "stream": stream})
    server.until(lambda: server.free_blocks < server.all_blocks)
    connection.close()
    server.until(lambda: server.free_blocks == server.all_blocks)  # the gate is closed: no step has ended
    server.until(lambda: server.engine.traffic.finished["abort"] == 2)
    server.gate.open()
    assert server.complete("a", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_reset_in_the_middle_of_a_stream_harms_nobody(start):
    server = start()
    connection = open_stream(server, {"prompt": "a", "max_tokens": 500})
    assert b"data: " in connection.recv(65536) + connection.recv(65536)
    server.gate.close()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # close sends RST
    connection.close()
    server.until(lambda: server.free_blocks == server.all_blocks)
    server.gate.open()
    assert server.complete("a", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_client_that_does_not_read_stalls_nobody_and_gets_everything_later(start, offline):
    server = start(max_num_seqs=64, send_buffer=4096)
    body = {"prompt": "import os", "n": 48, "max_tokens": 480, "seed": 3}
    slow = open_stream(server, body, receive_buffer=4096)
    server.until(lambda: server.running > 0)
    assert server.complete("x", max_tokens=100)["usage"]["completion_tokens"] == 100
    server.until(lambda: not server.llm.engine.has_unfinished())
    (job,) = server.engine._jobs  # the engine is done with it, its client is not
    kept = sum(len(sample.text) for output in job._ready.values() for sample in output.outputs)
    assert 0 < kept <= 48 * 480 * 4
    outputs = offline.generate("import os", SamplingParams(n=48, max_tokens=480, seed=3))
    assert read_texts(slow) == {sample.index: sample.text for sample in outputs[0].outputs}
    slow.close()


def test_a_client_that_never_reads_is_dropped(start):
    server = start(max_num_seqs=64, client_timeout_s=0.2, send_buffer=4096)
    slow = open_stream(server, {"prompt": "import os", "n": 16, "max_tokens": 500}, receive_buffer=4096)
    server.until(lambda: server.running > 0)
    server.until(lambda: not server.engine._jobs)
    assert server.free_blocks == server.all_blocks
    slow.close()


def test_200_clients_at_once(start, offline):
    server = start(max_num_seqs=32)
    prompts = [f"def f{index}(x):" for index in range(200)]

    async def one(client, index):
        text = ""
        body = {"prompt": prompts[index], "max_tokens": 12, "seed": index, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def everybody():
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=200)
        ) as client:
            return await asyncio.gather(*(one(client, index) for index in range(200)))

    params = [SamplingParams(max_tokens=12, seed=index) for index in range(200)]
    assert asyncio.run(everybody()) == [output.outputs[0].text for output in offline.generate(prompts, params)]
    assert server.free_blocks == server.all_blocks


def test_streams_survive_pre_emption(start, offline):
    token = (8 + 2 * 16) * 2 * 4  # bytes: K and V widths, layers, float32
    server = start(cache_bytes=22 * 8 * token, block_size=8, max_model_len=120, max_num_seqs=8)
    body = {"prompt": ["import os", "def f(x)", "€"], "n": 4, "max_tokens": 60, "seed": 1}
    streams = [open_stream(server, body) for _ in range(3)]
    params = SamplingParams(n=4, max_tokens=60, seed=1)
    outputs = offline.generate(body["prompt"], params)
    texts = dict(enumerate(sample.text for output in outputs for sample in output.outputs))
    for connection in streams:
        assert read_texts(connection) == texts
        connection.close()
    assert server.llm.engine.scheduler.preemptions > 0
