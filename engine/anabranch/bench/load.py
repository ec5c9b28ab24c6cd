"""Clients of a server, many at once: each asks for a stream, notes when its parts arrive, and asks again.

Raw sockets under asyncio, and no JSON until an answer is over: on a small machine the clients take their time from the
server that they measure.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

READ_BYTES = 1 << 16
PART = b'"finish_reason"'  # in every event with a choice, not in the one with the usage


@dataclass(slots=True)
class Answer:
    """One request: when its parts came, in seconds after it was sent, and what the server counted."""

    arrivals_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What some clients saw in `seconds`."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.output_tokens for answer in self.answers) / self.seconds

    @property
    def first_s(self) -> list[float]:
        """Time to the first part of each answer."""
        return [answer.arrivals_s[0] for answer in self.answers if answer.arrivals_s]

    @property
    def gaps_s(self) -> list[float]:
        """Times between two parts of an answer."""
        return [
            after - before
            for answer in self.answers
            for before, after in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)
        ]

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error is not None]


def run_load(url: str, bodies: Sequence[Mapping[str, Any]], *, clients: int) -> Load:
    """Send all requests (of /v1/completions, without `stream`) by so many clients, each its next when one is over."""
    return asyncio.run(_run(url, bodies, clients))


async def _run(url: str, bodies: Sequence[Mapping[str, Any]], clients: int) -> Load:
    waiting = iter([_encode(url, body) for body in bodies])  # shared: who is free takes the next
    start = time.perf_counter()
    found = await asyncio.gather(*(_client(url, waiting) for _ in range(clients)))
    return Load(seconds=time.perf_counter() - start, answers=tuple(answer for each in found for answer in each))


async def _client(url: str, waiting: Iterator[bytes]) -> list[Answer]:
    return [await _ask(url, request) for request in waiting]


async def _ask(url: str, request: bytes) -> Answer:
    answer = Answer()
    place = urlsplit(url)
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(request)
            raw = bytearray()
            while piece := await reader.read(READ_BYTES):
                raw += piece
                if PART in piece:
                    answer.arrivals_s.append(time.perf_counter() - start)
        finally:
            writer.close()
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error}"
        return answer
    _read_end(bytes(raw), answer)
    return answer


def _encode(url: str, body: Mapping[str, Any]) -> bytes:
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def _read_end(raw: bytes, answer: Answer) -> None:
    """Status and usage, which is the last event but [DONE]. Chunks end where events end, so lines are whole."""
    status = raw[9:12].decode("latin-1")
    _, _, body = raw.partition(b"\r\n\r\n")
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
    if status != "200" or not events or b"data: [DONE]" not in body:
        answer.error = f"status {status}: {body[:200].decode('utf-8', 'replace')}"
        return
    last = json.loads(events[-1])
    if "error" in last:
        answer.error = str(last["error"])
        return
    answer.output_tokens = last["usage"]["completion_tokens"]


def read_metrics(url: str) -> dict[str, float]:
    """Our server's counters and gauges by name, without their prefix; labels stay in the name."""
    with urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return dict(_pairs(line for line in lines if line.startswith("anabranch_")))


def _pairs(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    for line in lines:
        name, _, value = line.rpartition(" ")
        yield name.removeprefix("anabranch_"), float(value)
