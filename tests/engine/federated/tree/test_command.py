"""`anabranch federated tree`: what it prints, writes and refuses."""

import json

import pytest

from anabranch.cli import main

QUICK = ["federated", "tree", "--rounds", "2", "--bridge", "pca:8", "--batch", "256", "--no-progress"]


def test_it_writes_its_tables_and_page(tmp_path, capsys):
    out = tmp_path / "out"
    given = [
        "--tree",
        "2,4",
        "--also",
        "rectify=off",
        "--noise",
        "clean",
        "symmetric:0.4",
        "--seeds",
        "2",
        "--averaging",
    ]
    assert main([*QUICK, *given, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown
    found = json.loads((out / "results.json").read_text())
    assert [(row["noise"], row["variant"]) for row in found["table"]] == [
        (noise, variant) for noise in ("clean", "symmetric:0.4") for variant in ("fedeec", "rectify=off", "averaging")
    ]  # fmt: skip
    assert len(found["runs"]) == 8
    assert len(found["averaging"]) == 4
    table = (out / "results.md").read_text()
    assert table.count("\n| rectify=off |") == 2
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 * 3
    for text in ("rectify=off", "averaging", "Every tier of fedeec", "edges"):
        assert text in page
    assert main([*QUICK, *given, "--out", str(out), "--resume"]) == 0
    assert json.loads((out / "results.json").read_text())["runs"] == found["runs"]


def test_a_server_and_clients_as_json(capsys):
    given = ["--tree", "4", "--networks", "mlp:8,mlp:16", "--seed", "5", "--sequential", "yes", "--json"]
    assert main([*QUICK, *given]) == 0
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert (run["seed"], run["heights"]) == (5, [1, 0, 0, 0, 0])
    assert found["plan"]["tree"] == [4]
    assert found["plan"]["variants"]["fedeec"]["sequential"] is True
    (row,) = found["table"]
    n = (1348 - int(0.15 * 1348)) / 4  # samples of a leaf, on average
    assert row["link_bytes"] == [2 * 40 * n]
    assert row["before_bytes"] == [(8 + 1) * 4 * n]
    assert row["averaging_bytes"] == 2 * 4 * (64 * 8 + 8 + 80 + 10)
    assert row["inner"] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tree", "3"], "a tree of 2 tiers needs as many networks"),
        (["--tree", "3,x"], "tree must be int, got 'x'"),
        (["--tree", "5,3"], "none fewer than above"),
        (["--also", "rectify"], "NAME=VALUE"),
        (["--rectify", "always"], "rectify is off"),
        (["--sequential", "maybe"], "sequential must be bool"),
        (["--noise", "pairflip"], "needs a rate"),
        (["--public", "2"], "public must be in (0, 1)"),
        (["--lr", "-1"], "need lr > 0"),
        (["--resume"], "to resume, name the folder"),
    ],
)
def test_what_can_be_mended_is_said_in_one_line(given, said, capsys):
    assert main([*QUICK, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
