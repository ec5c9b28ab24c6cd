"""The study of merged heads: its plan, its table, and that it goes on where it stopped."""

from pathlib import Path

from anabranch.common.checkpoint import read_json
from anabranch.convert import study
from anabranch.convert.settings import ConvertSettings


def test_every_count_of_heads_meets_every_method(tmp_path):
    base = ConvertSettings(model=Path("m"), out=tmp_path, key_heads=1, text=("t",), heal=100)
    runs = study.plan(base, 6, ("c",))
    assert [run.key_heads for run in runs.values()] == [6, 3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert {(run.method, run.calibrate) for run in runs.values()} == {("mean", ()), ("svd", ()), ("svd", ("c",))}
    assert len({run.out for run in runs.values()}) == 10


def test_the_command_converts_what_is_missing(make_checkpoint, text, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("Another text.\n" * 10)
    names = {"runs": tmp_path / "runs", "json": tmp_path / "figures.json", "report": tmp_path / "page.md"}
    arguments = [str(make_checkpoint("llama")), "--text", str(text), "--calibrate", str(tmp_path / "other.txt")]
    arguments += [word for name, path in names.items() for word in (f"--{name}", str(path))]
    arguments += ["--heal", "21", "--batch", "1"]
    assert study.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:4] == ["unchanged", "2 mean", "2 svd", "2 svd, calibrated"]
    figures = read_json(names["json"])
    unchanged, *merged = figures["conversions"]
    assert (unchanged["merged"]["kl"], unchanged["healed"]) == (0.0, None)
    assert len(merged) == 6
    assert all(row["healed"]["tokens"] == unchanged["merged"]["tokens"] for row in merged)
    page = names["report"].read_text()
    assert "| 4 | unchanged | 384 | 0.0% | 0.0000 |" in page
    assert page.count("svd, calibrated") == 2
    (tmp_path / "runs" / "1-svd" / "conversion.json").unlink()
    assert study.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 svd"
    again = read_json(names["json"])["conversions"]
    assert [row["healed"] for row in again] == [row["healed"] for row in figures["conversions"]]
