"""What the C library does with memory that is freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
KEPT, FROM_SYSTEM = 1 << 30, 30_000_000  # bytes; 32 MiB is the largest glibc allows for the second


def keep_freed_memory() -> bool:
    """Let malloc keep up to a GiB of freed memory for the rest of this process; False where this is not glibc's.

    Tensors of some MB come and go in every step of training. By default their memory goes back to the system each time,
    and its pages are asked for again one by one: a third of the time (measured). For programs, not for libraries: it
    changes the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, FROM_SYSTEM) and mallopt(M_TRIM_THRESHOLD, KEPT))
