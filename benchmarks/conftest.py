"""What the benchmarks share: the roofs of this machine, and how a contender is run under pytest-benchmark.

    pytest benchmarks                                  every contender of every op, grouped by case
    pytest benchmarks/bench_skinny_linear.py --quick   only to see that it runs

pytest-benchmark times contenders one after another. Figures for a claim come from `anabranch bench`, which takes them
in turns.
"""

from collections.abc import Callable

import pytest

from anabranch.bench.machine import working_set_bytes
from anabranch.bench.timing import Case, Contender, best_flops, check_agreement
from anabranch_kernels.roofline import read_sweep

ROUNDS = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: shows that it runs, not how fast")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def working_set(quick: bool) -> int:
    return 1 if quick else working_set_bytes()


@pytest.fixture(scope="session")
def flops_roof(quick: bool) -> float:
    return best_flops(size=64 if quick else 1024)


@pytest.fixture(scope="session")
def read_roof(quick: bool) -> Callable[[], float]:
    return read_sweep(bytes=1 << 20 if quick else 1 << 29)


@pytest.fixture
def run(benchmark, quick, flops_roof, read_roof) -> Callable[[Case, str], None]:
    """Time one contender of a case, and say how much of the nearer roof it reaches."""

    def run_one(case: Case, name: str) -> None:
        contender = next(contender for contender in case.contenders if contender.name == name)
        check_agreement(Case(name=case.name, contenders=(case.contenders[0], contender)))
        benchmark.group = case.name
        read = max(read_roof() for _ in range(3))
        benchmark.pedantic(contender.step, rounds=2 if quick else ROUNDS, warmup_rounds=1)
        benchmark.extra_info["roofline"] = share_of_roof(contender, benchmark.stats["median"], read, flops_roof)

    return run_one


def share_of_roof(contender: Contender, median_s: float, read_roof: float, flops_roof: float) -> float:
    """The time that the nearer roof allows, over the time taken."""
    return max(contender.read_bytes / read_roof, contender.flops / flops_roof) / median_s
