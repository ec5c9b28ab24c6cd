"""Several processes for one model, seen from rank 0: start them, tell them each step, notice when one is gone.

Rank 0 is the caller's process: it schedules, samples and turns tokens into text, and computes its own part of every
step. Ranks 1 .. size - 1 are worker processes (worker.py) that hold their parts and do the same steps. Each is told
through a pipe of its own, one write of one packed array; the ranks meet again in the first sum of the first block.

Whatever breaks a step on one rank leaves the others waiting in an exchange, so it ends them all: the step fails with
WorkerError, and so does every later one. Ctrl-C is no such failure, it waits for the end of the exchange.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from anabranch.models.config import ModelConfig
from anabranch.models.shard import cut
from anabranch.serve.group import ProcessGroup, place
from anabranch.serve.memory import cache_budget
from anabranch.serve.runner import CACHE_DTYPES, Batch, Integers
from anabranch.serve.worker import CACHES, FORWARD, LOGITS, Settings, encode

END_TIMEOUT_S = 5.0  # for a worker to end by itself
NOTICE_S = 2.0  # between a broken connection and the end of the process that broke it

Process = subprocess.Popen[bytes]


class WorkerError(ChildProcessError):
    """A process that holds a part of the model is gone, or out of step; the model has to be loaded again."""


class Workers:
    """The processes of ranks 1 .. size - 1. Closed by `close`, when it is collected, and when this process ends.

    device    "cpu": the threads that torch may use are divided among the ranks, here until `close`;
              "cuda": rank r takes GPU r
    group     rank 0's end of the group: give it to `load_model`
    close()   end the processes, as often as you like
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        config = ModelConfig.load(folder)
        for rank in range(size):
            cut(config, rank, size)  # refuses before anything is started
        _check_device(device, size)
        self.size, self.device = size, place(device, 0)
        self.group = ProcessGroup(0, size)
        self._failure = "the workers are closed"
        self._meeting = Path(tempfile.mkdtemp(prefix="anabranch-"))  # for this user alone
        self._processes: list[Process] = []
        threads = torch.get_num_threads()
        self.close = weakref.finalize(
            self, _end, self._processes, self.group, self._meeting, threads, os.getpid()
        )  # also at exit
        share = max(1, threads // size) if device.type == "cpu" else threads
        torch.set_num_threads(share)
        for rank in range(1, size):
            settings = Settings(
                folder=str(folder), rank=rank, size=size, dtype=None if dtype is None else str(dtype).split(".")[1],
                device=device.type, threads=share, rendezvous=str(self._meeting / "ranks"), leader=os.getpid(),
            )  # fmt: skip
            self._processes.append(_start(settings))

    def join(self) -> int:
        """Wait until every worker has loaded its part; the bytes that a rank's cache may take, on every rank.

        Rank 0 must have loaded its own part by now: what is free is counted here.
        """
        replies = self._hear("budget", "while it loaded the model")
        return min([*replies, cache_budget(self.device, self.size)])

    def start(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """Have every rank make its caches, and connect them."""
        sizes = np.array([num_blocks, block_size, list(CACHE_DTYPES.values()).index(dtype)])
        with suppress(BrokenPipeError):  # the answer that is missing says more
            self._tell(CACHES, [sizes])
        self._hear("caches", "while it made its caches")
        self.group.connect(self._meeting / "ranks", self.device)
        if self.device.type == "cuda":
            for process in self._processes:
                threading.Thread(target=_abort_after, args=(process, self.group), daemon=True).start()

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[None]:
        """While the block runs, the workers compute this batch with it."""
        with self._together(FORWARD, batch):
            yield

    @contextmanager
    def logits(self, rows: Integers) -> Iterator[None]:
        """While the block runs, the workers score these rows of the latest batch with it."""
        with self._together(LOGITS, [rows]):
            yield
            self.group.settle()  # before anybody samples from them

    @contextmanager
    def _together(self, kind: int, arrays: Sequence[Integers]) -> Iterator[None]:
        if not self.close.alive:
            raise WorkerError(self._failure)
        with _interrupts_wait():
            try:
                self._tell(kind, arrays)
                yield
            except Exception as error:
                self._fail(self._cause(error))
                raise WorkerError(self._failure) from error
            except BaseException:
                self._fail("rank 0 was interrupted in an exchange")
                raise

    def _tell(self, kind: int, arrays: Sequence[Integers]) -> None:
        message = encode(kind, arrays)
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(message)
            process.stdin.flush()

    def _hear(self, key: str, doing: str) -> list[int]:
        """What every worker answers; WorkerError if one ends instead."""
        replies = []
        for rank, process in enumerate(self._processes, 1):
            reply = _reply(process)
            if key not in reply:
                self._fail(f"{self._name(rank)} {_how_it_ended(process, reply)} {doing}")
                raise WorkerError(self._failure)
            replies.append(reply[key])
        return replies

    def _fail(self, cause: str) -> None:
        self._failure = f"{cause}; load the model again"
        self.group.abort()
        for process in self._processes:
            process.kill()
        self.close()

    def _cause(self, error: Exception) -> str:
        """Which processes are gone, or what else went wrong here."""
        deadline = time.monotonic() + NOTICE_S
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            time.sleep(0.01)
        causes = [
            f"{self._name(rank)} {_how_it_ended(process, _reply(process))}"
            for rank, process in enumerate(self._processes, 1)
            if process.poll() is not None
        ]
        return ", ".join(causes) or f"rank 0 failed, {type(error).__name__}: {error}"

    def _name(self, rank: int) -> str:
        return f"the worker of rank {rank} of {self.size} (process {self._processes[rank - 1].pid})"


def _check_device(device: torch.device, size: int) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"tensor_parallel_size={size} needs device 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda" and device.index not in (None, 0):
        raise ValueError(f"ranks take GPUs 0 to {size - 1}, got device {str(device)!r}; choose by CUDA_VISIBLE_DEVICES")
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise ValueError(f"tensor_parallel_size={size} needs as many GPUs, torch finds {torch.cuda.device_count()}")


def _start(settings: Settings) -> Process:
    """A new interpreter with this one's import path. It does not run the caller's script again, as `spawn` would."""
    command = [sys.executable, "-P", "-m", "anabranch.serve.worker", json.dumps(asdict(settings))]
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(settings.threads)}
    pipe = subprocess.PIPE
    # a session of its own: the terminal's Ctrl-C is for rank 0
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)


def _reply(process: Process) -> dict[str, Any]:
    """What a worker says next; empty if it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    reply: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
    return reply


def _how_it_ended(process: Process, reply: dict[str, Any]) -> str:
    code = process.wait()
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}" + (f", {reply['error']}" if "error" in reply else "")


def _abort_after(process: Process, group: ProcessGroup) -> None:
    process.wait()
    group.abort()


def _end(processes: list[Process], group: ProcessGroup, meeting: Path, threads: int, leader: int) -> None:
    if os.getpid() != leader:  # a fork of the caller's has not started them
        return
    group.close()
    for process in processes:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # what a dead one has not read
            process.stdin.close()
    for process in processes:
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    shutil.rmtree(meeting, ignore_errors=True)
    torch.set_num_threads(threads)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C in the block is heard after it, so that ranks stay in step; a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    heard: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(signal.SIGINT, heard[0])
