"""What a report shows is what was measured, in every format."""

import json

import pytest

from anabranch.bench.machine import Machine
from anabranch.bench.report import HEADER, Report, save, to_json, to_markdown, to_text
from anabranch.bench.timing import Sample

MACHINE = Machine(
    cpu="a CPU", vector_flags=("avx2",), cores=2, threads=2, last_cache_bytes=2**20, memory_bytes=2**30,
    system="Linux x86_64", python="3.11", versions=(("torch", "2.13"),),
)  # fmt: skip


def sample(case, contender, ms, tokens=0):
    return Sample(
        case=case, contender=contender, seconds=(ms / 1e3,) * 3, read_bytes=10**6, flops=10**7, read_roof=1e9,
        flops_roof=1e11, tokens=tokens,
    )  # fmt: skip


REPORT = Report(
    title="A title",
    machine=MACHINE,
    samples=(sample("small", "ours", 2), sample("small", "theirs", 5), sample("large", "ours", 4, tokens=8)),
    absent=("somebody: not installed",),
)


def test_rows_compare_with_the_first_contender_of_their_case():
    rows = [dict(zip(HEADER, row, strict=True)) for row in REPORT.rows()]
    assert [row["time / ours"] for row in rows] == ["1.00", "2.50", "1.00"]
    assert [row["ms"] for row in rows] == ["2.000", "5.000", "4.000"]
    assert [row["of roof"] for row in rows] == ["50%", "20%", "25%"]
    assert [row["GB/s"] for row in rows] == ["0.5", "0.2", "0.2"]
    assert [row["tokens/s"] for row in rows] == ["", "", "2000.0"]


def test_text_and_markdown_hold_every_row_the_machine_and_who_is_absent():
    for rendered in (to_text(REPORT), to_markdown(REPORT)):
        for part in ("A title", "theirs", "2.50", "a CPU, 2 cores (avx2), 2 threads", "not run: somebody"):
            assert part in rendered
    table = [line for line in to_markdown(REPORT).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(REPORT.samples)
    assert {line.count("|") for line in table} == {len(HEADER) + 1}


def test_json_keeps_every_number():
    content = json.loads(to_json(REPORT))
    assert content["machine"]["cpu"] == "a CPU"
    assert content["samples"][1]["seconds"] == [0.005] * 3
    assert content["samples"][1]["roof_share"] == pytest.approx(0.2)


def test_files_are_written_where_asked(tmp_path):
    save(REPORT, json_path=tmp_path / "r.json", markdown_path=tmp_path / "r.md", plot_path=tmp_path / "r.png")
    assert (tmp_path / "r.json").read_text() == to_json(REPORT)
    assert (tmp_path / "r.md").read_text() == to_markdown(REPORT)
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 3
