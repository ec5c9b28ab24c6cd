"""The engine behind an event loop: it runs in a thread of its own, and what it finds comes to whoever awaits it.

    admit -> Job.start (worker threads) -> engine thread: step, step, ... -> one call into the loop -> `async for`

Everything that waits for the interpreter costs the model time, so the two threads meet as rarely as they can: all
outputs of a step reach the loop in one call, steps shorter than 10 ms share one, and no second call is made while one
is under way. A reader that falls behind finds what has come in the meantime as one output: what is kept for it is never
more than its own request's text.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar, TypeVarTuple, Unpack

from anabranch.serve.adapters.library import LoadedAdapter
from anabranch.serve.engine import Engine
from anabranch.serve.request import CompletionOutput, RequestOutput, SamplingParams
from anabranch.serve.traffic import Traffic

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
GATHER_S = 0.01  # between two deliveries, unless a sample begins or ends: no reader can tell shorter steps apart
WORKERS = 4  # threads that tokenize and queue, so that one long text does not hold up the short ones
SICK_AFTER = 3  # steps in a row that the model may fail before the engine counts as broken


class QueueFull(RuntimeError):
    """There is no place for the request now; there may be one soon."""


class EngineStopped(RuntimeError):
    """The server is going down, or the time it gives its last requests is over."""


class EngineCrashed(RuntimeError):
    """The engine's thread has ended by an error: no request will ever be answered."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt as the engine takes it."""

    ids: list[int]
    cache_salt: str = ""
    adapter: LoadedAdapter | None = None


class Job:
    """One client's request: some prompts with the same parameters, and a place for each of their samples.

    Iterating gives lists of (index of the prompt, what is new of it) and ends when all samples have ended. Call `close`
    whatever happens: it gives the places back, and the blocks of what still runs.
    """

    def __init__(self, owner: "AsyncEngine", samples: int) -> None:
        self.samples = samples
        self._owner = owner
        self._arrival_s = time.perf_counter()
        self._lock = threading.Lock()  # between a worker that queues prompts and a client that leaves meanwhile
        self._ids: list[str] = []
        self._closed = False
        self._unfinished = 0
        self._ready: dict[int, RequestOutput] = {}
        self._seen: set[int] = set()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def start(self, prompts: Sequence[TokenPrompt], params: SamplingParams, *, stream: bool) -> None:
        """Queue the prompts. ValueError, with nothing queued, if one of them can never run.

        With `stream` every step's tokens come at once; otherwise each prompt comes when it is done.
        """
        self._unfinished = len(prompts)
        await self._owner.in_worker(self._queue, prompts, params, stream)

    def _queue(self, prompts: Sequence[TokenPrompt], params: SamplingParams, stream: bool) -> None:
        for prompt in prompts:
            self._owner.engine.check(prompt.ids, params)
        for index, prompt in enumerate(prompts):
            with self._lock:
                if self._closed:
                    return
                request_id = self._owner.route(self, index)
                self._ids.append(request_id)  # from here on `close` takes it back
                self._owner.queue(request_id, prompt, params, stream)

    def __aiter__(self) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        return self

    async def __anext__(self) -> list[tuple[int, RequestOutput]]:
        while not self._ready:
            if self._unfinished == 0:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._waiter = self._owner.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, {}
        return list(ready.items())

    def close(self) -> None:
        """Free what still runs, at once. Closing twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._owner.release(self, self._ids)

    def push(self, index: int, output: RequestOutput) -> None:
        """Something new of a prompt; on the loop."""
        self._count(index, output)
        self._unfinished -= output.finished
        older = self._ready.get(index)
        self._ready[index] = output if older is None else merge(older, output)
        self._wake()

    def fail(self, error: Exception) -> None:
        """No more will come; on the loop."""
        self._error = error
        self._wake()

    def _count(self, index: int, output: RequestOutput) -> None:
        traffic, moments = self._owner.traffic, output.metrics
        traffic.output_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        if index not in self._seen:
            self._seen.add(index)
            traffic.prompt_tokens += len(output.prompt_token_ids)
            traffic.cached_tokens += output.num_cached_tokens
            if moments.first_token_s is not None:
                traffic.first_s.add(moments.first_token_s - self._arrival_s)
        if output.finished:
            reason = "error" if output.error is not None else output.outputs[-1].finish_reason
            traffic.finished[reason or "stop"] += 1
            traffic.whole_s.add((moments.finished_s or time.perf_counter()) - self._arrival_s)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Runs an `Engine` in a thread and hands its outputs to jobs on the event loop that called `start`.

    max_queue  samples that may wait beside the max_num_seqs that can run
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        self.engine = engine
        self.max_samples = engine.config.max_num_seqs + max_queue
        self.traffic = Traffic()
        self.loop: asyncio.AbstractEventLoop
        self._jobs: set[Job] = set()
        self._samples = 0
        self._numbers = count()
        self._routes: dict[str, tuple[Job, int]] = {}
        self._arrived: deque[list[RequestOutput]] = deque()
        self._announced = 0  # 1: the loop has been asked to fetch what has arrived; 2: at once
        self._delivered_s = 0.0
        self._work = threading.Event()
        self._stopping = False
        self._end: Exception | None = None  # why no job will be answered any more
        self._thread = threading.Thread(target=self._run, name="engine")
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="prepare")

    def start(self) -> None:
        """Begin to step, for the loop that is running now."""
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Let open jobs fail, then `halt`."""
        self.end(EngineStopped("the server is shutting down"))
        await asyncio.to_thread(self.halt)

    def halt(self) -> None:
        """End the threads, the engine's after its step; from any thread, and more than once if need be."""
        self._stopping = True
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def end(self, error: Exception) -> None:
        """Let all open jobs fail, and all that may come; on the loop."""
        self._end = self._end or error
        for job in self._jobs:
            job.fail(self._end)

    @property
    def broken(self) -> str | None:
        """What makes it useless, or None while all is well."""
        if self._end is not None:
            return str(self._end)
        failed = self.engine.stats.failed_steps
        return f"the model failed in each of the last {failed} steps" if failed >= SICK_AFTER else None

    def admit(self, samples: int) -> Job:
        """A place for a request of so many samples, over all its prompts. QueueFull if there is none at the moment.

        ValueError if there can never be one.
        """
        if self._end is not None:
            raise self._end
        if samples > self.max_samples:
            raise ValueError(f"the request asks for {samples} samples (prompts times n), allowed {self.max_samples}")
        if self._samples + samples > self.max_samples:
            self.traffic.rejected += 1
            raise QueueFull(f"the queue is full: {self._samples} samples run or wait; try again later")
        job = Job(self, samples)
        self._jobs.add(job)
        self._samples += samples
        return job

    async def in_worker(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a function in a worker thread, off the loop."""
        return await self.loop.run_in_executor(self._workers, function, *args)

    def route(self, job: Job, index: int) -> str:
        """A new id, whose outputs will go to a job's prompt."""
        request_id = str(next(self._numbers))
        self._routes[request_id] = job, index
        return request_id

    def queue(self, request_id: str, prompt: TokenPrompt, params: SamplingParams, stream: bool) -> None:
        """Give a prompt to the engine; in a worker thread."""
        self.engine.add_request(
            request_id, prompt.ids, params, cache_salt=prompt.cache_salt, adapter=prompt.adapter, stream=stream
        )
        self._work.set()

    def release(self, job: Job, request_ids: Sequence[str]) -> None:
        """A job is over: nothing of it runs any longer."""
        self._jobs.remove(job)
        self._samples -= job.samples
        for request_id in request_ids:
            if self._routes.pop(request_id, None) is not None:
                self.engine.abort(request_id)
                self.traffic.finished["abort"] += 1

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._work.wait()
                self._work.clear()
                self._drive()
        except BaseException as error:
            logger.exception("the engine's thread ended")
            crash = EngineCrashed(f"the engine has crashed: {type(error).__name__}: {error}")
            self._end = crash
            self.loop.call_soon_threadsafe(self._deliver)  # what was finished before
            self.loop.call_soon_threadsafe(self.end, crash)

    def _drive(self) -> None:
        """Step until there is nothing to do."""
        engine, traffic, stats = self.engine, self.traffic, self.engine.stats
        before = time.perf_counter()
        while engine.has_unfinished() and not self._stopping:
            first, all_tokens = stats.first_tokens, stats.sampled_tokens
            outputs = engine.step()
            now = time.perf_counter()
            first = stats.first_tokens - first
            traffic.busy_s += now - before
            traffic.between_s.add(now - before, stats.sampled_tokens - all_tokens - first)
            before = now
            if outputs:
                self._arrived.append(outputs)
                self._announce(urgent=first > 0 or any(output.finished for output in outputs))

    def _announce(self, *, urgent: bool) -> None:
        """Have the loop fetch what has arrived, unless it has been asked already."""
        urgency = 2 if urgent else 1
        if urgency > self._announced:
            self._announced = urgency
            self.loop.call_soon_threadsafe(self._deliver if urgent else self._deliver_soon)

    def _deliver_soon(self) -> None:
        wait_s = self._delivered_s + GATHER_S - self.loop.time()
        if wait_s > 0:
            self.loop.call_later(wait_s, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._announced = 0  # before looking: what arrives from now on is announced again
        if not self._arrived:  # something urgent was faster
            return
        self._delivered_s = self.loop.time()
        while self._arrived:
            for output in self._arrived.popleft():
                route = self._routes.get(output.request_id)
                if route is None:  # its client has left
                    continue
                if output.finished:
                    del self._routes[output.request_id]
                if output.error is not None:
                    logger.error("a request failed: %s", output.error)
                job, index = route
                job.push(index, output)


def merge(older: RequestOutput, newer: RequestOutput) -> RequestOutput:
    """Two outputs of a stream as one."""
    samples = {sample.index: sample for sample in older.outputs}
    for sample in newer.outputs:
        before = samples.get(sample.index)
        samples[sample.index] = sample if before is None else _join(before, sample)
    return replace(newer, outputs=list(samples.values()))


def _join(older: CompletionOutput, newer: CompletionOutput) -> CompletionOutput:
    return replace(
        newer,
        token_ids=older.token_ids + newer.token_ids,
        decoded=None if newer.decoded is None else (older.decoded or "") + newer.decoded,
        logprobs=None if newer.logprobs is None else (older.logprobs or []) + newer.logprobs,
    )
