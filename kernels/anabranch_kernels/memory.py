"""Where large tensors live: in huge pages, whose addresses are found faster; in a virtual machine much faster."""

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 * 1024 * 1024
MADV_HUGEPAGE = 14  # <linux/mman.h>


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask the system to back a large CPU tensor with huge pages; returns the tensor.

    Helps only before the tensor is first written to. A wish, not a demand: a system that has none, or is told never to
    use them, keeps its ordinary pages, and nothing else changes. Other devices and systems are left alone.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE * HUGE_PAGE
        if end > first:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_HUGEPAGE)
    return tensor
