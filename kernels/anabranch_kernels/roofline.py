"""The machine's read bandwidth, measured: what decoding is compared with."""

import time
from collections.abc import Callable
from statistics import median

import torch

from .native import ISA, extension


def read_bandwidth(device: str | torch.device = "cpu", *, bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second of a sweep that only reads, median of `repeats`; CPU: with `torch.get_num_threads()` threads.

    `bytes` must be well above the caches (512 MiB by default). A GPU sums the buffer.
    """
    words = torch.ones(bytes // 4, dtype=torch.int32, device=device)
    if words.device.type == "cpu":
        times = [_seconds(lambda: _sweep(words)) for _ in range(repeats + 1)][1:]
    else:
        synchronize = torch.get_device_module(words.device).synchronize
        times = [_seconds(lambda: (words.sum(), synchronize())) for _ in range(repeats + 1)][1:]
    return words.nbytes / median(times)


def _sweep(words: torch.Tensor) -> None:
    extension.read_memory(words.data_ptr(), words.nbytes, ISA, torch.get_num_threads())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
