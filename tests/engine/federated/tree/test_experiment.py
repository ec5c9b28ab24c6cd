"""Trees are compared seed by seed, go on after any death, and end with the same bits."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from anabranch.data.labelled import Labelled
from anabranch.federated import local, run_files
from anabranch.federated.experiment import LAST
from anabranch.federated.plan import Plan
from anabranch.federated.tree.experiment import compare, named, set_apart
from anabranch.federated.tree.plan import BASE, SCHEDULE, FedEEC, TreePlan

C, M = 3, 90


def task(**given):
    y = torch.arange(M) % C
    x = torch.nn.functional.one_hot(y, C).float() + 0.3 * torch.randn(M, C, generator=torch.Generator().manual_seed(0))
    return Labelled(name="drawn", kind="vector", x=x, y=y, test_x=x[:30], test_y=y[:30], names="abc", **given)


def plan(*, out=None, resume=False, threads=1, seeds=1, noise=("pairflip:0.4",), rounds=3, **changes):
    settings = FedEEC(networks=("mlp:3", "mlp:4", "mlp:8"), bridge="pca:2", **changes.pop("settings", {}))
    inner = Plan(
        clients=5, out=out, resume=resume, threads=threads, seeds=seeds, noise=noise, partition="dirichlet:1",
        schedule=replace(SCHEDULE, rounds=rounds),
    )  # fmt: skip
    return TreePlan(**{"tree": (2, 5), "settings": settings, "plan": inner, **changes})


def outcome(of, stop=None):
    return compare(of, task(), interrupted=stop or threading.Event(), progress=False)


def test_public_samples_are_nobodys():
    owners = torch.arange(M) % 5
    public, private = set_apart(task(given={"people": owners % C}, owners=owners), 0.2)
    assert len(public) == 18
    assert len(private.y) == len(private.given["people"]) == len(private.owners) == 72
    everything = torch.cat([public, private.x])
    assert torch.equal(everything[everything[:, 0].argsort()], task().x[task().x[:, 0].argsort()])
    assert torch.equal(private.given["people"], private.owners % C)
    assert torch.equal(set_apart(task(), 0.2)[0], public)


def test_what_is_written_down_is_what_happened():
    results = outcome(
        plan(seeds=2, noise=("clean", "symmetric:0.5"), also=("rectify=off", "bridge=pca:1"), averaging=True)
    )
    assert [(one.noise, one.seed, one.variant) for one in results.courses] == [
        (noise, seed, variant) for noise in ("clean", "symmetric:0.5") for seed in (0, 1)
        for variant in (BASE, "rectify=off", "bridge=pca:1")
    ]  # fmt: skip
    n = len(results.data.y)
    for course in results.courses:
        assert course.heights == [2, 1, 1, 0, 0, 0, 0, 0]
        assert course.before == [n * 4 * (1 + (1 if course.variant == "bridge=pca:1" else 2))] * 2
        for entry in course.rounds:
            assert entry["bytes"] == {"up": [4 * C * n] * 2, "down": [4 * C * n] * 2}
            assert entry["told"] == [n, 2 * n, n]
        mean = sum(sum(entry["accuracy"][3:]) / 5 for entry in course.rounds) / 3
        assert course.last(0) == pytest.approx(mean)
        assert LAST > 3
    assert [(one.noise, one.seed) for one in results.averages] == [
        ("clean", 0), ("clean", 1), ("symmetric:0.5", 0), ("symmetric:0.5", 1)
    ]  # fmt: skip
    assert len({one.models for one in results.courses}) == len(results.courses)


def test_neither_company_nor_threads_change_a_bit(monkeypatch):
    alone = outcome(plan()).courses[0]
    monkeypatch.setattr(local, "CACHED_NUMBERS", 1)  # every node is a group of its own
    one, many = (outcome(plan(threads=threads, also=("sequential=true",))).courses for threads in (1, 3))
    assert [a.models for a in one] == [b.models for b in many]
    monkeypatch.undo()
    assert outcome(plan(also=("rectify=swap",), averaging=True)).courses[0].models == alone.models


class Died(BaseException):
    """The machine stops."""


@pytest.mark.parametrize("moment", ["half a line", "tensors"])
def test_a_run_that_died_ends_with_the_same_bits(moment, tmp_path, monkeypatch):
    given = {"settings": {"migrate": 0.3}, "rounds": 4}
    whole = outcome(plan(out=tmp_path / "whole", **given)).courses[0]
    append, write_json = run_files.append, run_files.write_json

    def append_or_die(path, entry):
        if moment == "half a line" and entry["round"] == 2:
            path.open("a").write('{"round": ')
            raise Died
        append(path, entry)

    def point_or_die(path, content):
        if moment == "tensors" and content["round"] == 3:
            raise Died
        write_json(path, content)

    monkeypatch.setattr(run_files, "append", append_or_die)
    monkeypatch.setattr(run_files, "write_json", point_or_die)
    with pytest.raises(Died):
        outcome(plan(out=tmp_path / "died", **given))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        outcome(plan(out=tmp_path / "died", **given))
    ended = outcome(plan(out=tmp_path / "died", resume=True, **given)).courses[0]

    def timeless(course):
        return [{**entry, "seconds": 0} for entry in course.rounds]

    assert timeless(ended) == timeless(whole)
    assert ended.models == whole.models
    for name in ("model.safetensors", "round-000004.safetensors"):
        (one,), (other,) = ((tmp_path / run).rglob(name) for run in ("whole", "died"))
        assert one.read_bytes() == other.read_bytes()
    assert sum(entry["moved"] for entry in whole.rounds) > 0
    again = outcome(plan(out=tmp_path / "died", resume=True, **given)).courses[0]
    assert again == ended
    other = plan(out=tmp_path / "died", resume=True, rounds=4, settings={"migrate": 0.3, "beta": 2.0})
    with pytest.raises(ValueError, match="a resumed run keeps what it is"):
        outcome(other)


def test_a_stopped_comparison_says_so(tmp_path):
    stop = threading.Event()
    stop.set()
    stopped = outcome(plan(out=tmp_path, averaging=True), stop)
    assert (stopped.interrupted, stopped.courses, stopped.averages) == (True, [], [])


def test_models_are_written_by_node_and_tensor(tmp_path):
    outcome(plan(out=tmp_path))
    (path,) = tmp_path.rglob("model.safetensors")
    stored = load_file(path)
    assert len(stored) == 8 * 4
    assert stored["0.0.weight"].shape == (3, 8)
    assert stored["7.0.weight"].shape == (3, 3)


def test_numbers_that_run_away_are_an_error():
    wild = plan()
    with pytest.raises(ValueError, match="not finite after round 1; try a smaller lr"):
        outcome(replace(wild, plan=replace(wild.plan, schedule=replace(SCHEDULE, lr=1e30))))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"networks": ("mlp:3", "mlp:x", "mlp:4")}, "a network is written mlp"),
        ({"networks": ("mlp:3", "cnn:4", "mlp:4")}, "a network is written mlp"),
        ({"networks": ("mlp:3", "cnn", "mlp:4")}, "cnn is not for data of kind 'vector'"),
        ({"rectify": "ring:0"}, "rectify is off"),
        ({"bridge": "conv"}, "conv needs"),
    ],
)
def test_what_is_wrong_is_said_at_once(settings, said):
    of = plan()
    with pytest.raises(ValueError, match=said):
        outcome(replace(of, settings=replace(of.settings, **settings)))


def test_networks_by_name():
    assert named("mlp") == ("mlp", ())
    assert named("mlp:64x32") == ("mlp", (64, 32))
    assert named("resnet10") == ("resnet10", ())
