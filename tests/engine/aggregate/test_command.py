"""The command: what it prints and writes, what it refuses and how it ends."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.aggregate.command import read_weights
from anabranch.cli import main


@pytest.fixture
def paths(make_clients, save):
    return [str(path) for path in save(make_clients(9))]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out.safetensors"


def test_the_default_is_the_geometric_median(paths, out, capsys):
    assert main(["aggregate", "-o", str(out), *paths]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["client", "weight", "distance", "nearest"]
    assert [line.split()[0] for line in lines[1:10]] == paths
    assert lines[11] == "geometric-median, all tensors as one vector: 3291 numbers in 6 tensors"
    assert lines[12].startswith("certificate: converged, within ")
    assert lines[-1] == f"wrote {out}"
    assert captured.err == ""
    assert load_file(out).keys() == {"matrix", "vector", "number", "empty", "steps", "mask"}


@pytest.mark.parametrize(
    "options",
    [
        ["--rule", "mean", "--weights", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
        ["--rule", "krum", "--f", "2", "--neighbours", "4"],
        ["--rule", "multi-krum", "--f", "2", "--chosen", "3"],
        ["--rule", "bulyan", "--f", "1"],
        ["--rule", "smea", "--f", "2", "--mode", "per-tensor"],
        ["--rule", "centred-clipping", "--radius", "2", "--steps", "3", "--base", "BASE"],
        ["--rule", "fltrust", "--root", "FIRST"],
        ["--rule", "nearest-neighbours", "--f", "3", "--own", "FIRST"],
        ["--rule", "foolsgold", "--confidence", "0.5", "--base", "BASE"],
        ["--rule", "trimmed-mean", "--f", "2", "--pre", "nnm", "--pre", "bucketing", "--bucket", "1", "--seed", "4"],
        ["--rule", "sign-majority", "--step", "0.01", "--base", "BASE", "--no-distances"],
        ["--pre", "static-clipping", "--clip", "3", "--tol", "1e-4", "--threads", "1", "--progress"],
    ],
    ids=lambda options: options[1],
)
def test_rules_and_options_are_reachable(options, paths, out, make_clients, save, capsys):
    (base,) = save(make_clients(1, seed=5), "base")
    words = [{"BASE": str(base), "FIRST": paths[0]}.get(word, word) for word in options]
    assert main(["aggregate", *words, "--json", "-", "-o", str(out), *paths]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clients"] == paths
    assert all(x.isfinite().all() for x in load_file(out).values() if x.is_floating_point())


def test_a_report_and_a_picture_are_written(paths, out, tmp_path, capsys):
    files = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "clients.png")]
    for rule in (["--rule", "krum", "--f", "1"], ["--rule", "coordinate-median", "--no-distances"]):
        assert main(["aggregate", *rule, *files, "-o", str(out), *paths]) == 0
        assert json.loads((tmp_path / "report.json").read_text())["method"] == rule[1]
        assert (tmp_path / "clients.png").read_bytes().startswith(b"\x89PNG")
        assert "wrote" in capsys.readouterr().out


def test_a_dropped_client_is_in_the_report(make_clients, save, out, capsys):
    clients = make_clients(7)
    clients[2]["matrix"][3, 3] = torch.inf
    paths = [str(path) for path in save(clients)]
    arguments = ["aggregate", "--rule", "krum", "--f", "2", "-o", str(out), *paths]
    assert main(arguments) == 2
    assert f"not finite: {paths[2]} in matrix" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert main([*arguments, "--non-finite", "drop"]) == 0
    assert "dropped: matrix is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "krum"], "krum needs f"),
        (["--rule", "krum", "--f", "5"], "2f < N, got f=5, N=9"),
        (["--rule", "mean", "--f", "1"], "mean takes weights; got f too"),
        (["--weights", "1", "2"], "weights must be 9 finite numbers"),
        (["--rule", "fltrust", "--root", "nobody"], "--root must be one of the clients given, got nobody"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "nowhere/report.json"], "there is no folder nowhere"),
        (["--plot", "OUT"], "is the result or one of the files to read"),
        (["--base", "nobody.safetensors"], "there is no file nobody.safetensors"),
    ],
)
def test_what_the_user_can_mend_takes_one_line_and_writes_nothing(options, words, paths, out, capsys):
    options = [str(out) if word == "OUT" else word for word in options]
    assert main(["aggregate", "-o", str(out), *paths, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anabranch: ")
    assert words in line
    assert list(out.parent.iterdir()) == []


def test_files_that_do_not_fit_are_named(paths, out, tmp_path, capsys):
    save_file({"matrix": torch.zeros(2)}, tmp_path / "odd.safetensors")
    for path, words in ((tmp_path / "odd.safetensors", "5 tensors missing"), (tmp_path / "no.safetensors", "no file")):
        assert main(["aggregate", "-o", str(out), *paths, str(path)]) == 2
        error = capsys.readouterr().err
        assert path.name in error
        assert words in error
    assert main(["aggregate", "-o", paths[3], *paths]) == 2
    assert "one of the files to read" in capsys.readouterr().err


def test_weights_are_numbers_or_a_json_file(tmp_path):
    clients = ["runs/a.safetensors", "runs/b.safetensors"]
    path = tmp_path / "weights.json"

    def read(content):
        path.write_text(json.dumps(content))
        return read_weights([str(path)], clients)

    assert read_weights(["1", "2.5"], clients) == (1.0, 2.5)
    assert read([1, 2.5]) == (1.0, 2.5)
    assert read({"b.safetensors": 3, "runs/a.safetensors": 1}) == (1.0, 3.0)
    for content, words in (
        ({"b.safetensors": 3}, r"missing=\['a.safetensors'\]"),
        ({"a.safetensors": 1, "b.safetensors": 3, "c": 1}, r"surplus=\['c'\]"),
        (["1", 2], "must hold a list of numbers"),
        ([True, 2], "must hold a list of numbers"),
        (3, "must hold a list of numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            read(content)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_weights([str(path)], clients)
    with pytest.raises(ValueError, match=r"--weights takes numbers or one \.json file, got 1 many"):
        read_weights(["1", "many"], clients)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_nothing_behind(number, paths, out):
    source = f"""
import sys, time
from anabranch import cli
from anabranch.aggregate import sources, sweep
sources.TILE_BYTES, original = 1, sweep._sum
def slow(*args):
    print("on", flush=True)
    time.sleep(0.2)
    return original(*args)
sweep._sum = slow
sys.exit(cli.main(["aggregate", "-o", {str(out)!r}, *{paths!r}]))
"""
    command = [sys.executable, "-c", source]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert list(out.parent.iterdir()) == []
