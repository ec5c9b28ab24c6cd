"""The HTTP server under load, beside the same engine without it, and beside other servers.

A random model without a tokenizer, prompts of random token ids, outputs of a fixed length: every contender computes the
same number of tokens. Ours runs in a process of its own, as users start it; the clients and the engine without a server
share this one, and take turns.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from anabranch import LLM, SamplingParams
from anabranch.bench.engine import LLAMA_315M, TINY, random_prompts, save_random_model
from anabranch.bench.load import Answer, Load, read_metrics, run_load
from anabranch.bench.machine import Machine
from anabranch.bench.timing import interleave
from anabranch.models.config import ModelConfig

MAIN = "import sys; from anabranch.cli import main; sys.exit(main())"
OURS, OFFLINE = "anabranch serve", "anabranch offline"
HEADER = (
    "case", "contender", "tokens/s", "of offline", "first p50 ms", "p99", "next p50 ms", "p99", "host gap", "errors",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured.

    clients         of each row: so many ask at once
    rounds          requests of each client in one sample
    prompt_tokens, output_tokens  of a request
    prefix_tokens   of the prompt that is sent twice, for the time to its first token with and without the cache
    repeats         samples of each contender, in turns
    """

    config: ModelConfig
    clients: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int
    repeats: int
    threads: int

    @property
    def max_len(self) -> int:
        return max(self.prompt_tokens + self.output_tokens, self.prefix_tokens + 2)


def plan(*, quick: bool, clients: Sequence[int], repeats: int, threads: int) -> Plan:
    """The full measurement, or one that only shows that it runs."""
    if quick:
        return Plan(
            config=TINY, clients=(1, 3), rounds=1, prompt_tokens=24, output_tokens=6, prefix_tokens=160,
            repeats=repeats, threads=threads,
        )  # fmt: skip
    return Plan(
        config=replace(LLAMA_315M, max_position=8192), clients=tuple(clients), rounds=2, prompt_tokens=256,
        output_tokens=64, prefix_tokens=4096, repeats=repeats, threads=threads,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one case.

    tokens_per_s     of each sample
    first_s, next_s  median and 99th percentile of the times to a first token, and between two parts of a stream, over
                     all samples; None where nothing streams
    host_gap         share of the engine's time that was spent outside the model; None where nobody tells
    errors           what requests ended with that did not succeed
    """

    case: str
    contender: str
    tokens_per_s: tuple[float, ...]
    first_s: tuple[float, float] | None
    next_s: tuple[float, float] | None
    host_gap: float | None
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """A table for `report.to_text` and its like."""

    title: str
    machine: Machine
    measured: tuple[Row, ...]

    @property
    def header(self) -> tuple[str, ...]:
        return HEADER

    def rows(self) -> list[tuple[str, ...]]:
        """One line for each contender of each case."""
        offline = {row.case: median(row.tokens_per_s) for row in self.measured if row.contender == OFFLINE}
        return [_cells(row, offline.get(row.case)) for row in self.measured]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            "first: from sending a request to its first token; next: between two parts of a stream",
            "host gap: the engine's time outside the model, over all its time with something to do",
            *dict.fromkeys(f"{row.contender}: {error}" for row in self.measured for error in row.errors[:1]),
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {"title": self.title, "machine": asdict(self.machine), "rows": [asdict(row) for row in self.measured]}


def measure(steps: Plan, urls: Mapping[str, str]) -> list[Row]:
    """All rows. `urls` names other servers that run already, with the same API over any model."""
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as name:
        folder = Path(name)
        save_random_model(steps.config, folder)
        with start_server(folder, steps) as ours:
            contenders = {OURS: ours, **urls}
            rows = [row for clients in steps.clients for row in measure_load(folder, steps, clients, contenders)]
            return rows + [row for pair in contenders.items() for row in measure_prefix(steps, *pair)]


@contextmanager
def start_server(folder: Path, steps: Plan) -> Iterator[str]:
    """`anabranch serve` in a process; yields its address when it answers."""
    options = {
        "--port": 0, "--max-num-seqs": max(steps.clients), "--max-model-len": steps.max_len, "--dtype": "bfloat16",
        "--device": "cpu",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-c", MAIN, "serve", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(steps.threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("anabranch: "):
            raise ValueError(f"the server did not start; it said: {line!r}")
        try:
            yield line.split()[-1]
        finally:
            process.terminate()


def measure_load(folder: Path, steps: Plan, clients: int, urls: Mapping[str, str]) -> list[Row]:
    """Servers and the offline engine with the same number of requests, in turns; no prompt comes twice."""
    prompts = random_prompts(steps.config.vocab_size, steps.prompt_tokens)
    count = clients * steps.rounds
    llm = LLM(folder, dtype="bfloat16", device="cpu", max_model_len=steps.max_len, max_num_seqs=clients)
    params = SamplingParams(max_tokens=steps.output_tokens, temperature=0.0, ignore_eos=True)

    def offline() -> Load:
        return _offline(llm, [next(prompts) for _ in range(count)], params)

    def served(url: str) -> Load:
        bodies = [_body(next(prompts), steps.output_tokens) for _ in range(count)]
        return run_load(url, bodies, clients=clients)

    before = read_metrics(urls[OURS])
    runs: list[Callable[[], Load]] = [*(partial(served, url) for url in urls.values()), offline]
    results = interleave(runs, repeats=steps.repeats, warmup=1, settle_s=0.2)
    gap = host_gap(before, read_metrics(urls[OURS]))
    case = f"{clients} clients, {steps.prompt_tokens} + {steps.output_tokens} tokens"
    return [
        _row(case, name, loads, gap if name == OURS else None)
        for name, loads in zip([*urls, OFFLINE], results, strict=True)
    ]


def measure_prefix(steps: Plan, contender: str, url: str) -> list[Row]:
    """One client and long prompts: each new to the server, then at once again."""
    prompts = random_prompts(steps.config.vocab_size, steps.prefix_tokens)
    cold, warm = [], []
    for _ in range(steps.repeats):
        body = [_body(next(prompts), 1)]
        cold.append(run_load(url, body, clients=1))
        warm.append(run_load(url, body, clients=1))
    return [
        _row(f"first token after {steps.prefix_tokens}, {kind}", contender, loads, None)
        for kind, loads in (("new", cold), ("again", warm))
    ]


def host_gap(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Share of the engine's busy time outside the model, between two readings of its metrics."""
    model, busy = (after[name] - before[name] for name in ("model_seconds_total", "engine_busy_seconds_total"))
    return 1 - model / busy


def _offline(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> Load:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Load(
        seconds=seconds,
        answers=tuple(Answer(output_tokens=len(sample.token_ids)) for one in outputs for sample in one.outputs),
    )


def _body(prompt: list[int], tokens: int) -> dict[str, Any]:
    # Without a tokenizer tokens have no text: a stream shows their ids, or nothing until its end.
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def _row(case: str, contender: str, loads: Sequence[Load], gap: float | None) -> Row:
    return Row(
        case=case,
        contender=contender,
        tokens_per_s=tuple(load.tokens_per_s for load in loads),
        first_s=_ends([value for load in loads for value in load.first_s]),
        next_s=_ends([value for load in loads for value in load.gaps_s]),
        host_gap=gap,
        errors=tuple(error for load in loads for error in load.errors),
    )


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return (median(ordered), ordered[round(0.99 * (len(ordered) - 1))]) if ordered else None


def _cells(row: Row, offline: float | None) -> tuple[str, ...]:
    speed = median(row.tokens_per_s)
    times = [f"{value * 1e3:.1f}" for ends in (row.first_s, row.next_s) for value in (ends or ())]
    times = [*times[:2], *(times[2:] or ("", ""))] if times else [""] * 4
    return (
        row.case, row.contender, f"{speed:.1f}", "" if offline is None else f"{speed / offline:.2f}", *times,
        "" if row.host_gap is None else f"{row.host_gap:.1%}", str(len(row.errors)),
    )  # fmt: skip
