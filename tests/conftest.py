"""What every test shares: the interpreter for Triton, threads, devices, data and tolerances."""

import os
import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // WORKERS)))  # read once, when torch loads

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit runs: before any kernel module is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

# Interpreted kernels and first calls are slow by nature; a deadline would only make them flaky. Examples that change
# from run to run would find a fault in somebody else's change.
settings.register_profile(
    "default", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """`data("stories260k")`: a folder of the data sets that may lie beside the repository, or a skip."""

    def folder(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(f"no data set {name!r} beside the repository (../shared/data/{name})")
        return DATA / name

    return folder


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(2)` sets the number of threads that torch and our kernels use, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tolerance() -> Callable[[torch.dtype], dict[str, float]]:
    """`assert_close(got, expected, **tolerance(dtype))` against a float64 result, for values of order one.

    Rounding decides: the result is rounded once to its dtype (relative 2**-8 for bfloat16, 2**-11 for float16), and so
    may be what went into it (a probability, a partial sum): four such steps. In float32 a sum of some thousand terms
    errs by about the square root of that many steps of 2**-24: 1e-5.
    """
    units = {torch.float64: 2.0**-40, torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
    return lambda dtype: {"atol": units[dtype], "rtol": units[dtype]}
