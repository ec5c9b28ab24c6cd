"""A small run against a real server process, and a table that says what was measured."""

import pytest

from anabranch.bench.machine import describe
from anabranch.bench.report import to_json, to_markdown
from anabranch.bench.serve import HEADER, OFFLINE, OURS, Row, ServeReport, host_gap, measure, plan


def row(contender, speeds, **values):
    return Row(**{
        "case": "a case", "contender": contender, "tokens_per_s": speeds, "first_s": (0.01, 0.02), "next_s": None,
        "host_gap": None, "errors": (), **values,
    })  # fmt: skip


def test_rows_compare_with_the_engine_without_a_server():
    rows = (row(OURS, (90.0, 95.0, 99.0), next_s=(0.001, 0.003), host_gap=0.04), row(OFFLINE, (100.0,), first_s=None))
    report = ServeReport(title="A title", machine=describe(), measured=rows)
    ours, offline = (dict(zip(HEADER, cells, strict=True)) for cells in report.rows())
    assert (ours["tokens/s"], ours["of offline"], ours["host gap"]) == ("95.0", "0.95", "4.0%")
    assert report.rows()[0][4:8] == ("10.0", "20.0", "1.0", "3.0")
    assert report.rows()[1][4:8] == ("", "", "", "")
    assert (offline["of offline"], offline["host gap"]) == ("1.00", "")
    assert "| a case | anabranch serve | 95.0 |" in to_markdown(report)
    assert '"host_gap": 0.04' in to_json(report)


def test_errors_stand_in_the_table_and_under_it():
    report = ServeReport(title="t", machine=describe(), measured=(row("other", (0.0,), errors=("status 500", "x")),))
    assert report.rows()[0][-1] == "2"
    assert report.notes()[-1] == "other: status 500"


def test_the_gap_is_what_the_model_leaves():
    before = {"model_seconds_total": 1.0, "engine_busy_seconds_total": 2.0}
    after = {"model_seconds_total": 4.0, "engine_busy_seconds_total": 6.0}
    assert host_gap(before, after) == pytest.approx(0.25)


@pytest.mark.slow
def test_a_small_run_measures_every_contender():
    steps = plan(quick=True, clients=(1,), repeats=1, threads=1)
    rows = measure(steps, {})
    load = [one for one in rows if "clients" in one.case]
    assert [one.contender for one in load] == [OURS, OFFLINE] * len(steps.clients)
    assert all(one.errors == () and min(one.tokens_per_s) > 0 for one in rows)
    assert all(0 < one.host_gap < 1 for one in load if one.contender == OURS)
    assert [one.case for one in rows[-2:]] == ["first token after 160, new", "first token after 160, again"]
    assert all(one.first_s is not None for one in rows if one.contender == OURS)
