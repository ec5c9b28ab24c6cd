"""The read-bandwidth sweep: it reads every byte, and its numbers are bandwidths. How large they are is not tested."""

import pytest
import torch

from anabranch_kernels.native import extension
from anabranch_kernels.roofline import read_bandwidth, read_sweep

FASTEST = 1e14  # bytes/s; no memory of today comes near, so more would mean that nothing was read


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 4, 3 << 20])
def test_bandwidth_is_positive_and_possible(size):
    assert 0 < read_bandwidth(bytes=size, repeats=2) < FASTEST
    sweep = read_sweep(torch.device("cpu"), bytes=size)
    assert all(0 < sweep() < FASTEST for _ in range(3))


@pytest.mark.parametrize("isa", extension.supported_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_the_sweep_reads_every_float(isa, threads):
    """It returns the highest: one that stands out is found wherever it lies, on both sides of a chunk's end."""
    words = torch.ones(5 << 16)
    chunk = 1 << 18  # floats in a task of 1 MiB
    for place in (*range(64), chunk - 1, chunk, chunk + 1, words.numel() - 1):
        words[place] = 3
        assert extension.read_memory(words.data_ptr(), words.nbytes, isa, threads) == 3
        words[place] = 1


@pytest.mark.gpu
def test_bandwidth_of_a_gpu():
    assert 0 < read_bandwidth("cuda", bytes=1 << 24, repeats=2) < FASTEST
