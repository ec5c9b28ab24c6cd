"""`anabranch federated`: what it prints, writes and refuses."""

import json
import tomllib
from pathlib import Path

import pytest

from anabranch.cli import main
from anabranch.federated.choices import METHODS

QUICK = ["--rounds", "2", "--epochs", "1", "--clients", "4", "--no-progress"]


def test_run_prints_json(capsys):
    assert main(["federated", "run", "--noise", "pairflip:0.4", "--seeds", "2", "--seed", "7", "--json", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in found["runs"]] == [7, 8]
    assert found["plan"]["clients"] == 4
    assert len(found["table"][0]["accuracies"]) == 2


def test_bench_writes_its_table_and_page(tmp_path, capsys):
    config = tmp_path / "own.toml"
    config.write_text('method = ["fedavg", "fedcfa"]\nnoise = ["clean", "pairflip:0.4"]\n[set.fedcfa]\ngroup = 32\n')
    out = tmp_path / "out"
    assert main(["federated", "bench", "--config", str(config), "--out", str(out), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "fedcfa:group=32" in shown
    found = json.loads((out / "results.json").read_text())
    assert len(found["runs"]) == 4
    assert (out / "results.md").read_text().count("\n| ") == 3 * 3  # all accuracies, and either noise
    assert "fedcfa:group=32" in (out / "report.html").read_text()
    assert len(list(out.rglob("model.safetensors"))) == 4


def test_the_grid_of_all_methods_in_small(tmp_path):
    """The committed comparison, and that no method there is is missing from it."""
    grid, out = Path(__file__).parents[3] / "benchmarks/federated-digits.toml", tmp_path / "out"
    compared = {text.partition(":")[0] for text in tomllib.loads(grid.read_text())["method"]}
    assert compared == METHODS.keys()
    small = ["--seeds", "1", "--clients", "20", "--batch", "64", "--noise", "symmetric:0.6@half"]
    assert main(["federated", "bench", "--config", str(grid), "--out", str(out), *QUICK, *small]) == 0
    rows = json.loads((out / "results.json").read_text())["table"]
    assert {row["method"].partition(":")[0] for row in rows} == compared


def test_methods_are_listed(capsys):
    assert main(["federated", "methods"]) == 0
    assert set(METHODS) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "fedbest"], "unknown method 'fedbest'; choose one of"),
        (["--set", "mu=1"], "method fedavg has no option 'mu'"),
        (["--noise", "pairflip"], "needs a rate"),
        (["--data", "banking77"], "where does banking77 lie"),
        (["--network", "cnn"], "cnn is not for data of kind 'vector'"),
        (["--clients", "9999"], "too few for 9999 clients"),
        (["--partition", "zipf"], "unknown partition 'zipf'"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--lr", "quick"], "lr must be float, got 'quick'"),
        (["--hidden", "0"], "must be positive"),
    ],
)
def test_what_can_be_mended_is_said_in_one_line(given, said, capsys):
    assert main(["federated", "run", "--no-progress", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_run_takes_one_method_and_options_belong_to_methods(tmp_path, capsys):
    config = tmp_path / "own.toml"
    config.write_text('method = ["fedavg", "fedcfa"]\n')
    assert main(["federated", "run", "--config", str(config)]) == 2
    assert "bench compares several" in capsys.readouterr().err
    config.write_text("[set.fedcfa]\ngroup = 32\n")
    assert main(["federated", "bench", "--config", str(config)]) == 2
    assert "methods that are not compared: ['fedcfa']" in capsys.readouterr().err
