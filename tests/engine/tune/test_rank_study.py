"""The study of ranks: its command, and that finished runs are not done again."""

import json

import pytest

from anabranch.tune import rank_study, rank_teachers


def test_tables_figures_and_a_picture_come_out_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    arguments = [
        "--parts", "teachers", "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "figures.json"), "--report",
        str(tmp_path / "page.md"), "--plot", str(tmp_path / "figures.png"), "--seeds", "3", "--steps", "20",
        "--no-progress",
    ]  # fmt: skip
    every = rank_teachers.variants
    kept = ("LoRA-6", "linear", "AdaLoRA", "linear, by probe")
    monkeypatch.setattr(rank_teachers, "variants", lambda s: {name: every(s)[name] for name in kept})
    assert rank_study.main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [run["method"] for run in figures["teachers"]] == list(kept)
    assert all(f"| {method} |" in printed for method in kept)
    assert printed.strip() in (tmp_path / "page.md").read_text()
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(rank_teachers, "learn", lambda *_: pytest.fail("done twice"))
    assert rank_study.main(arguments) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "texts"], "texts need --model and --data"),
        (["--parts", "teachers", "--steps", "5"], "--steps must be at least 20, got 5"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, options, message, capsys):
    files = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "b.md")]
    with pytest.raises(SystemExit):
        rank_study.main([*files, *options])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
