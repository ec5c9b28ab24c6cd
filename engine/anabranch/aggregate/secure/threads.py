"""Long parts handled by several threads: hashing, ciphers and NumPy let others run meanwhile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Done = TypeVar("Done")

WORTH_A_THREAD = 1 << 20  # bytes: about what is hashed while a thread starts ten times


def each(work: Callable[[Item], Done], items: Sequence[Item], size: int) -> list[Done]:
    """work(item) for all items of about `size` bytes, in at most as many threads as torch uses.

    `work` must leave torch's own threads alone: every thread that asks for them gets a team of its own.
    """
    threads = min(torch.get_num_threads(), len(items), len(items) * size // WORTH_A_THREAD)
    if threads < 2:
        return [work(item) for item in items]

    def some(first: int) -> list[Done]:
        return [work(item) for item in items[first::threads]]

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(some, first) for first in range(1, threads)]
        dealt = [some(0), *(other.result() for other in others)]
    return [dealt[k % threads][k // threads] for k in range(len(items))]
