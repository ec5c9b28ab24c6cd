"""Clients count what a server sends, and tell what went wrong."""

import socket
import threading

import pytest

from anabranch.bench.load import run_load

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PART = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.fixture
def answer():
    """`answer([bytes, ...])`: a server that sends these pieces, each after the one before was surely read."""
    listeners = []

    def serve(pieces, requests=None):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def work():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    raw = connection.recv(65536)
                    if requests is not None:
                        requests.append(raw)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for piece in pieces:
                        connection.sendall(piece)
                        threading.Event().wait(0.02)

        threading.Thread(target=work, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_parts_are_timed_and_tokens_taken_from_the_usage(answer):
    requests = []
    url = answer([HEAD, chunk(PART), chunk(PART), chunk(USAGE) + chunk(DONE)], requests)
    load = run_load(url, [{"prompt": [1]}, {"prompt": [2]}, {"prompt": [3]}], clients=2)
    assert [one.output_tokens for one in load.answers] == [7, 7, 7]
    assert [len(one.arrivals_s) for one in load.answers] == [2, 2, 2]
    assert load.errors == []
    assert len(load.first_s) == len(load.gaps_s) == 3
    assert min(load.gaps_s) > 0
    assert load.tokens_per_s == pytest.approx(21 / load.seconds)
    assert all(b'"stream": true' in raw and b'"include_usage": true' in raw for raw in requests)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}"], "status 429"),
        ([HEAD, chunk(b'data: {"error":{"message":"broken"}}\n\n'), chunk(DONE)], "broken"),
        ([HEAD, chunk(PART)], "status 200"),
        ([], "status "),
    ],
)
def test_what_went_wrong_is_told(answer, pieces, message):
    (error,) = run_load(answer(pieces), [{"prompt": [1]}], clients=1).errors
    assert message in error


def test_nobody_there_is_an_error_of_each_request():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    load = run_load(url, [{"prompt": [1]}] * 3, clients=2)
    assert len(load.errors) == 3
    assert load.tokens_per_s == 0
