"""Comparisons are paired, go on after any death, and end with the same bits."""

import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from anabranch.cli import main
from anabranch.data.labelled import Labelled
from anabranch.federated import report, tables
from anabranch.federated.choices import Chosen, choose_method
from anabranch.federated.experiment import LAST, compare, generator, lay_out, slug
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.plan import Plan
from anabranch.federated.schedule import Schedule
from anabranch.labels.noise import pairs, target_matrix

C, M = 3, 90


def task():
    drawn = torch.Generator().manual_seed(0)
    y = torch.arange(M) % C
    x = torch.nn.functional.one_hot(y, C).float() + 0.3 * torch.randn(M, C, generator=drawn)
    return Labelled(name="drawn", kind="vector", x=x, y=y, test_x=x[:30], test_y=y[:30], names="abc")


def plan(**changes):
    given = {
        "clients": 5,
        "hidden": (4,),
        "noise": ("pairflip:0.4",),
        "schedule": Schedule(rounds=3, epochs=1, batch=4),
    }
    return Plan(**{**given, **changes})


def outcome(of, *texts, stop=None):
    methods = [choose_method(text) for text in texts or ("fedavg",)]
    return compare(of, methods, task(), interrupted=stop or threading.Event(), progress=False)


def test_a_seed_lays_out_the_same_for_every_method_and_another_seed_does_not():
    laid, again, other = (lay_out(plan(), task(), "pairflip:0.4", seed) for seed in (0, 0, 1))
    assert torch.equal(laid.holdings.y, again.holdings.y)
    assert all(map(torch.equal, laid.holdings.owned, again.holdings.owned))
    assert not torch.equal(laid.holdings.y, other.holdings.y)
    assert generator(0, "noise").initial_seed() != generator(0, "partition").initial_seed()


def test_the_clients_are_the_same_under_every_noise():
    clean, noisy = (lay_out(plan(), task(), noise, 0) for noise in ("clean", "symmetric:0.5"))
    assert all(map(torch.equal, clean.holdings.owned, noisy.holdings.owned))
    assert float(clean.rates.max()) == 0 < float(noisy.rates.min())


def test_what_is_written_down_is_what_happened():
    results = outcome(plan(seeds=2, noise=("clean", "pairflip:0.4")), "fedavg")
    assert [(one.noise, one.seed) for one in results.courses] == [
        ("clean", 0), ("clean", 1), ("pairflip:0.4", 0), ("pairflip:0.4", 1),
    ]  # fmt: skip
    for course in results.courses:
        assert len(course.rounds) == 3
        assert sum(map(sum, course.confusion[0])) == 30
        assert course.rounds[-1][0]["accuracy"] == sum(course.confusion[0][c][c] for c in range(C)) / 30
        assert course.last() == sum(scores[0]["accuracy"] for scores in course.rounds[-LAST:]) / 3
    noisy = torch.tensor(results.courses[2].transition)
    # 7 of 18 labels of each client, in whatever classes: 35 of 90, and about as many of each class
    torch.testing.assert_close(noisy, target_matrix(35 / 90, pairs(C)).float(), atol=0.2, rtol=0)
    assert results.courses[2].rates == [7 / 18] * 5


def test_looking_less_often_changes_nothing_but_what_is_seen():
    often, seldom = outcome(plan()).courses[0], outcome(plan(evaluate_every=2)).courses[0]
    assert seldom.model == often.model
    assert seldom.rounds == [[], often.rounds[1], often.rounds[2]]
    assert seldom.confusion == often.confusion


def test_a_method_may_train_another_network_and_vote_of_its_networks():
    class Two(FedAvg):
        networks = 2

        def network(self, base):
            return MLP((*base.widths[:-1], 5, C))

        def vote(self, logits):
            assert logits.shape == (2, 30, C)
            return logits.sum(0, keepdim=True)

    results = compare(plan(), [Chosen("two", Two())], task(), interrupted=threading.Event(), progress=False)
    (course,) = results.courses
    assert [len(scores) for scores in course.rounds] == [1, 1, 1]
    assert len(course.confusion) == len(tables.rows_of([course])) == 1
    assert "two" in report.page(results)


def test_a_method_in_its_place_changes_nothing_for_the_others():
    alone = outcome(plan(), "fedavg").courses
    beside = outcome(plan(threads=3), "fedcfa", "fedavg").courses
    assert alone[0].model == beside[1].model != beside[0].model


def test_the_servers_numbers_of_clients_and_classes_are_listed():
    class Knowing(FedAvg):
        def first(self, network, clients):
            return {"noisy": torch.arange(clients) > 2, "flips": torch.eye(C), "other": torch.zeros(7)}

    course = compare(
        plan(), [Chosen("own", Knowing())], task(), interrupted=threading.Event(), progress=False
    ).courses[0]  # fmt: skip
    assert course.by_client == {"noisy": [0.0, 0.0, 0.0, 1.0, 1.0]}
    assert course.by_class == {"flips": torch.eye(C).tolist()}


def test_a_folder_is_used_once_unless_it_is_resumed(tmp_path):
    first = outcome(plan(out=tmp_path)).courses
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        outcome(plan(out=tmp_path))
    again = outcome(plan(out=tmp_path, resume=True)).courses
    assert again == first
    with pytest.raises(ValueError, match=r"a resumed run keeps what it is; .* lr is 0\.5, was 0\.05"):
        outcome(plan(out=tmp_path, resume=True, schedule=replace(plan().schedule, lr=0.5)))


def test_a_stopped_comparison_goes_on(tmp_path):
    stop = threading.Event()
    stop.set()
    stopped = outcome(plan(out=tmp_path), stop=stop)
    assert (stopped.interrupted, stopped.courses) == (True, [])
    assert outcome(plan(out=tmp_path, resume=True)).courses[0].model == outcome(plan()).courses[0].model


def test_numbers_that_run_away_are_an_error():
    with pytest.raises(ValueError, match="not finite after round"):
        outcome(plan(schedule=Schedule(rounds=9, lr=1e30)))


def test_resampled_clients_have_clean_labels_only():
    assert len(outcome(plan(partition="resample:6", clients=40, noise=("clean",))).courses[0].rates) == 40
    with pytest.raises(ValueError, match="take clean"):
        outcome(plan(partition="resample:6"))


def test_folders_are_named_for_what_they_hold():
    assert slug("fedavg") == "fedavg"
    assert slug("a:b") != slug("a/b") != slug("a b")
    assert "/" not in slug("../x=1,y=2")


DEATHS = """
import os, signal, sys
from anabranch.cli import main
from anabranch.federated import run_files

moment, rounds = sys.argv[1], int(sys.argv[2])
append, write_json = run_files.append, run_files.write_json  # in that order, in every round

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def append_and_die(path, entry):
    if moment == "half a line" and entry["round"] == rounds:
        with path.open("a") as file:
            file.write('{"round": ')
        die()
    append(path, entry)

def point_and_die(path, content):
    if moment == "tensors" and content["round"] == rounds:
        die()
    write_json(path, content)

run_files.append, run_files.write_json = append_and_die, point_and_die
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_one_round_and_ends_with_the_same_bits(tmp_path):
    base = ["federated", "run", "--noise", "pairflip:0.4", "--rounds", "4", "--epochs", "1", "--threads", "1"]
    base += ["--method", "fedcfa", "--no-progress", "--out"]
    assert main([*base, str(tmp_path / "whole")]) == 0
    again = [*base, str(tmp_path / "killed")]
    (cell,) = (path.parent for path in (tmp_path / "whole").rglob("result.json"))
    killed = tmp_path / "killed" / cell.relative_to(tmp_path / "whole")
    for i, (moment, at, left) in enumerate([("half a line", 1, 1), ("tensors", 3, 2)]):
        command = [sys.executable, "-c", DEATHS, moment, str(at), *again, *(["--resume"] if i else [])]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        assert json.loads((killed / "checkpoint.json").read_text())["round"] == left
    assert main([*again, "--resume"]) == 0
    for name in ("model.safetensors", "round-000004.safetensors"):
        assert (killed / name).read_bytes() == (cell / name).read_bytes()
    ended, whole = (json.loads((folder / "result.json").read_text()) for folder in (killed, cell))
    assert ended["model"] == whole["model"]
    assert ended["rounds"] == whole["rounds"]


def test_means_by_secure_sums(tmp_path):
    sums = {"secure": "privacy=2,fraction_bits=20", "out": tmp_path}
    (plain,), (secure,) = (outcome(plan(**more)).courses for more in ({}, sums))
    for before, after in zip(plain.rounds, secure.rounds, strict=True):
        assert after[0]["loss"] == pytest.approx(before[0]["loss"], abs=1e-4)
        assert after != before  # they were rounded
    (again,) = outcome(plan(**sums, resume=True)).courses
    assert again.model == secure.model  # masks are drawn anew, sums are exact
    said = " ".join(tables.about(outcome(plan(**sums, resume=True))))
    assert "the server and 2 clients together learn no more" in said
    assert "20 bits after the point; 0 were clipped" in said
    with pytest.raises(ValueError, match="a resumed run keeps what it is"):
        outcome(plan(out=tmp_path, resume=True))
    clipped = outcome(plan(secure="clip=0.001")).courses[0].clipped
    logged = [json.loads(line) for line in next(tmp_path.glob("*/*/*/rounds.jsonl")).read_text().splitlines()]
    assert clipped > 0 == sum(entry["clipped"] for entry in logged)


def test_methods_that_secure_sums_cannot_carry_are_named_before_anything_runs():
    with pytest.raises(ValueError, match="secure sums cannot carry FedExP"):
        outcome(plan(secure="privacy=2"), "fedavg", "fedexp")
    with pytest.raises(ValueError, match="need 8 clients in a round, a cohort has 5"):
        outcome(plan(secure="privacy=3,dropouts=2"))
