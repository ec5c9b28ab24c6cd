"""The benchmark of field coding: what it refuses to time, and what its table says."""

import pytest
import torch

from anabranch.bench.field_coding import FieldCase, FieldReport, Way, cases, measure
from anabranch.bench.machine import describe


def test_contenders_that_differ_in_one_element_are_not_timed():
    right, wrong = torch.arange(6).view(2, 3), torch.tensor([[0, 1], [3, 5]])
    ways = (Way(name="ours", step=lambda: right, products=6), Way(name="peer", step=lambda: wrong, products=4))
    with pytest.raises(ValueError, match="some case: peer differs from ours"):
        measure(FieldCase(name="some case", ways=ways), repeats=1)


def test_the_table_holds_every_contender_and_compares_rates():
    chosen = [case for case in cases(quick=True)[0] if case.name.startswith(("encode m31", "accept"))]
    samples = tuple(sample for case in chosen for sample in measure(case, repeats=2))
    report = FieldReport(title="fields", machine=describe(), samples=samples, absent=("galois is not installed",))
    rows = report.rows()
    assert [row[:2] for row in rows] == [(case.name, way.name) for case in chosen for way in case.ways]
    assert {row[-1] for row in rows if row[1] == "anabranch"} == {"1.00"}
    assert report.notes()[-1] == "not run: galois is not installed"
    assert report.numbers()["samples"][0]["rate"] == samples[0].rate > 0
