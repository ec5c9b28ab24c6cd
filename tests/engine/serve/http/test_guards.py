"""The key, the size of a body, the time it takes to arrive, and how many may be open at once."""

import socket
from functools import partial

import httpx
import pytest


def send(server, head, body=b""):
    """A request by hand; everything the server answers until it closes the connection or stops for long."""
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer.decode()


@pytest.fixture
def locked(start):
    return start(api_key="secret")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer sécret"],
)
def test_a_wrong_key_opens_nothing(locked, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
        response = httpx.request(method, locked.url + path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_key_opens_all_and_health_needs_none(locked):
    assert locked.complete("a", max_tokens=1)["object"] == "text_completion"
    assert locked.client.get("/metrics").status_code == 200
    assert httpx.get(locked.url + "/v1/models", headers={"authorization": "bearer  secret"}).status_code == 200
    assert httpx.get(locked.url + "/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_a_body_of_10_mb_is_refused_and_the_answer_arrives(server, chunked):
    body = b'{"prompt": "' + b"a" * (10 << 20) + b'"}'
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    response = server.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert server.complete("a", max_tokens=1)["object"] == "text_completion"


def test_a_body_that_does_not_arrive_is_not_waited_for(start):
    server = start(client_timeout_s=0.05)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100"
    assert send(server, head, b'{"prompt"').startswith("HTTP/1.1 408")


def test_what_is_not_http_harms_nobody(server):
    assert send(server, "\x16\x03\x01 hello").startswith("HTTP/1.1 400")
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5"
    assert send(server, head).startswith("HTTP/1.1 400")
    assert server.client.get("/health").status_code == 200


def test_only_so_many_may_be_open(start):
    server = start(max_concurrency=2)
    server.gate.close()
    body = {"prompt": "a", "stream": True}
    ask = partial(server.client.stream, "POST", "/v1/completions", json=body)
    with ask(), ask():
        response = server.client.post("/v1/completions", json={"prompt": "c"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert server.client.get("/health").status_code == 200
    server.gate.open()
    server.until(lambda: server.client.post("/v1/completions", json={"prompt": "c"}).status_code == 200)
