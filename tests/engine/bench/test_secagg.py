"""Both contenders of `bench secagg` sum the same job; Flower's primitives are optional."""

import numpy as np
import pytest

from anabranch.bench import secagg
from anabranch.bench.machine import describe


def test_our_rounds_are_exact_and_timed():
    found = secagg.our_round(8, 50, 1)
    assert found.client_s > 0
    assert found.server_s > 0
    assert found.bytes_up > 7 * 50


def test_flower_s_rounds_are_right_too():
    pytest.importorskip("flwr.common.secure_aggregation", reason="Flower is not installed")
    vectors = list(np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32))
    found = secagg.flower_round(vectors, 1)  # raises if the mean is off by more than a step
    assert found.error < 2 * secagg.CLIP / secagg.RANGE
    report = secagg.SecaggReport(
        machine=describe(), clients=5, length=20, drop=1, ours=(secagg.our_round(8, 20, 1),), flower=(found,)
    )
    assert [row[:2] for row in report.rows()] == [
        ("client", "ours, V2"), ("client", "Flower SecAgg"), ("server", "ours, V2"), ("server", "Flower SecAgg"),
        ("server, all", "ours, V2"), ("server, all", "Flower SecAgg"),
    ]  # fmt: skip
    assert all(len(row) == len(report.header) for row in report.rows())
    assert report.numbers()["flower"][0]["error"] == found.error
