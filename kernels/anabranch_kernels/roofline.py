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
    sweep = read_sweep(device, bytes=bytes)
    sweep()
    return median(sweep() for _ in range(repeats))


def read_sweep(device: str | torch.device = "cpu", *, bytes: int = 1 << 29) -> Callable[[], float]:
    """The same for a roof that takes turns with what it is compared with: each call sweeps once and gives bytes/s."""
    words = torch.ones(bytes // 4, dtype=torch.float32, device=device)
    if words.device.type == "cpu":
        read: Callable[[], object] = lambda: extension.read_memory(
            words.data_ptr(), words.nbytes, ISA, torch.get_num_threads()
        )
    else:
        synchronize = torch.get_device_module(words.device).synchronize
        read = lambda: (words.sum(), synchronize())

    def sweep() -> float:
        start = time.perf_counter()
        read()
        return words.nbytes / (time.perf_counter() - start)

    return sweep
