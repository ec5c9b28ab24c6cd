"""The command: a table that adds up, whole files, errors before the work."""

import json

from anabranch.cli import main


def test_the_table_and_the_files(tmp_path, capsys):
    json_file, plot = tmp_path / "robust.json", tmp_path / "robust.png"
    assert main(["demo", "robust", "--rounds", "3", "--json", str(json_file), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 clients learn to read digits. 6 are hostile: 2 sign flip, 2 ALIE, 2 label flip.\n")
    report = json.loads(json_file.read_text())
    assert (report["settings"]["rounds"], report["settings"]["hostile"]) == (3, 6)
    lines = out.splitlines()
    for i in range(4):
        cells = [f"{course[i]:.1%}" for course in report["accuracy"].values()]
        assert lines[3 + i].split() == ["round", str(i), *cells]
    for name, course in report["accuracy"].items():
        assert f"{name}: {course[-1]:.1%}" in lines
    assert "2410 numbers of 20 clients, proof V2" in out
    assert "the sum is bit for bit that of the quantised updates" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["robust.json", "robust.png"]


def test_without_the_secure_sum(capsys):
    assert main(["demo", "robust", "--rounds", "1", "--no-private"]) == 0
    assert "privately" not in capsys.readouterr().out


def test_errors_come_first(tmp_path, capsys):
    assert main(["demo", "robust", "--json", str(tmp_path / "no" / "r.json")]) == 2
    assert main(["demo", "robust", "--hostile", "10"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no folder" in err
    assert "fewer than half" in err
