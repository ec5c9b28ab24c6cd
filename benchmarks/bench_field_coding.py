"""Secret sharing over finite fields beside NumPy and galois."""

from functools import lru_cache

import pytest

from anabranch.bench.field_coding import FieldCase, cases

CASES = range(14)


@lru_cache(maxsize=1)
def made(quick: bool) -> list[FieldCase]:
    return cases(quick=quick)[0]


@pytest.mark.parametrize("index", CASES)
def test_field_coding(benchmark, quick, index):
    """Ours as it is called; `anabranch bench field-coding` takes all contenders in turns."""
    case = made(quick)[index]
    benchmark.group = case.name
    benchmark.extra_info["products"] = case.ways[0].products
    benchmark.pedantic(case.ways[0].step, rounds=2 if quick else 30, warmup_rounds=1)
