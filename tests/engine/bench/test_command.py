"""`anabranch bench` runs each kind, writes what it is asked for, and refuses before it measures."""

import json

import pytest
import torch

from anabranch.cli import main


@pytest.mark.parametrize(
    "kind",
    [
        ["attention"],
        ["linear", "--rows", "1", "3"],
        ["coordinate-rules", "--rows", "4", "5"],
        ["rank-lora", "--rows", "1", "3"],
        ["triadapt"],
        ["engine", "--peers", "transformers"],
    ],
    ids=lambda kind: kind[0],
)
def test_a_quick_run_prints_a_table_and_writes_files(kind, tmp_path, capsys):
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown", "plot")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["bench", *kind, "--quick", *options]) == 0
    samples = json.loads(files["json"].read_text())["samples"]
    printed = capsys.readouterr().out
    assert {sample["contender"] for sample in samples} >= {"anabranch"} or kind in (["attention"], ["triadapt"])
    assert all(sample["contender"] in printed for sample in samples)
    assert all(len(sample["seconds"]) == 3 for sample in samples)
    assert all(path.stat().st_size > 0 for path in files.values())


def test_a_quick_run_with_adapters_covers_both_models(tmp_path, capsys):
    path = tmp_path / "table.json"
    assert main(["bench", "adapters", "--quick", "--json", str(path)]) == 0
    samples = json.loads(path.read_text())["samples"]
    assert [sample["case"] for sample in samples[::4]] == ["package model, batch 4", "llama of 64, batch 4"]
    assert all(sample["contender"] in capsys.readouterr().out for sample in samples[:1])
    assert main(["bench", "adapters", "--adapters", "0"]) == 2
    assert "--batch and --adapters must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--cold", "--dtype", "bfloat16"]])
def test_a_quick_run_over_files_compares_with_a_copy(options, tmp_path, capsys):
    path = tmp_path / "table.json"
    arguments = ["--quick", "--clients", "7", "--folder", str(tmp_path), "--json", str(path), *options]
    assert main(["bench", "aggregate", *arguments]) == 0
    samples = json.loads(path.read_text())["samples"]
    assert [sample["contender"] for sample in samples][:2] == ["copy", "mean, no distances"]
    assert all(len(sample["seconds"]) == 3 and sample["contender"] in capsys.readouterr().out for sample in samples[:1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_quick_run_of_the_median_writes_a_table(tmp_path, capsys):
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["bench", "geometric-median", "--quick", "--clients", "5", "--no-peers", *options]) == 0
    samples = json.loads(files["json"].read_text())["samples"]
    medians = [one for one in samples if one["case"].startswith("median")]
    assert {one["contender"] for one in medians} == {"anabranch", "torch 10 steps"}
    assert all(one["gap_rel"] <= 1e-6 for one in medians if one["contender"] == "anabranch")
    assert all(one["case"] in files["markdown"].read_text() for one in samples)
    assert main(["bench", "geometric-median", "--clients", "1"]) == 2
    assert "--clients must be at least 2" in capsys.readouterr().err


def test_a_quick_run_of_federated_rounds_writes_a_table(tmp_path, capsys):
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["bench", "federated", "--quick", "--threads", "1", *options]) == 0
    measured = json.loads(files["json"].read_text())["measured"]
    printed = capsys.readouterr().out
    cases = {"D, 3 clients": 3, "F, 2 clients": 3, "C, 2 clients": 3, "methods, 4 clients, 5 epochs": 3}
    for case, contenders in cases.items():
        rows = [row for row in measured if row["case"] == case]
        assert len(rows) == contenders
        assert all(len(row["seconds"]) == 3 and row["contender"] in printed for row in rows)
    (scale,) = [row for row in measured if row["case"].startswith("D, 200 clients")]
    assert scale["peak"] > 1e8
    assert all(row["case"] in files["markdown"].read_text() for row in measured)
    assert main(["bench", "federated", "--clients", "0"]) == 2
    assert "--clients must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--url", "x"], "--url must be NAME=http://"), (["--clients", "0"], "--clients must be at least 1")],
)
def test_bad_options_of_serve_end_with_one_line(options, message, capsys):
    assert main(["bench", "serve", *options]) == 2
    assert message in capsys.readouterr().err


def test_threads_are_set_for_the_run_only(tmp_path):
    before = torch.get_num_threads()
    path = tmp_path / "table.json"
    assert main(["bench", "linear", "--quick", "--rows", "1", "--threads", "1", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["machine"]["threads"] == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats and --threads must be at least 1, got 0"),
        (["--json", "nowhere/table.json"], "there is no folder nowhere"),
        (["--heads", "32", "4", "5"], "Hq must be a multiple of Hv"),
    ],
)
def test_bad_options_end_with_one_line(options, message, capsys):
    assert main(["bench", "attention", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
