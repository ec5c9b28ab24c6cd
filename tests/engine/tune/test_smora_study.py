"""The study of rank-wise routing: its plan is fair, it goes on where it stopped, and its pages follow from its runs."""

import threading

import pytest

from anabranch.common.checkpoint import read_json
from anabranch.common.page import marks
from anabranch.tune import smora_study as study
from anabranch.tune import teacher_run
from anabranch.tune.smora_door import INTERRUPTED
from anabranch.tune.teacher_run import METHODS, TeacherRun
from anabranch.tune.teachers import Suite


@pytest.fixture
def small(monkeypatch):
    """The whole plan over tasks of width 16, in which a run takes milliseconds."""
    size = {"tasks": 4, "groups": 2, "rank": 2, "shared": 1, "width": 16}
    monkeypatch.setattr(study, "SUITES", {name: Suite(own=s.own, **size) for name, s in study.SUITES.items()})
    monkeypatch.setattr(study, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(teacher_run, "MEASURED", 64)
    monkeypatch.setattr(study, "VARIED", ("lora-64", "smora"))


@pytest.fixture
def arguments(tmp_path):
    names = {"runs": tmp_path / "runs", "json": tmp_path / "x.json", "report": tmp_path / "x.md"}
    words = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    return [*words, "--plot", str(tmp_path / "x.png"), "--seeds", "0", "1", "--steps", "2", "--no-progress"]


def rates_of(value):
    return {(suite, method): value for suite in study.SUITES.values() for method in METHODS}


def test_methods_of_a_seed_differ_in_method_and_rate_alone():
    runs = study.compared(rates_of(0.5), [3], 10)
    rest = {(run.suite.own, run.seed, run.steps, run.batch, run.balance) for run in runs}
    assert rest == {(0.0, 3, 10, 128, None), (0.9, 3, 10, 128, None)}
    assert [run.method for run in runs] == [*METHODS, *METHODS]


def test_every_method_tries_the_same_rates_on_teachers_of_their_own():
    runs = study.tuning(10)
    tried = {key: sorted(r.lr for r in runs if (r.suite, r.method) == key) for key in rates_of(0)}
    assert set(map(tuple, tried.values())) == {study.RATES}
    assert {run.seed for run in runs} == {study.VALIDATION}


def test_the_best_rate_leaves_least_and_diverged_ones_are_passed_over():
    runs = {lr: TeacherRun(lr=lr) for lr in (1e-3, 1e-2, 1e-1)}
    left = {1e-3: 0.5, 1e-2: 0.25, 1e-1: None}
    best = study.best_rates({run: {"left": left[lr]} for lr, run in runs.items()})
    assert best == {(Suite(), "smora"): 1e-2}


def test_one_condition_is_changed_at_a_time():
    runs = study.compared(rates_of(0.5), range(5), 10)
    conditions = study.varied(runs, range(5))
    assert conditions.keys() == study.VARIATIONS.keys()
    for some in conditions.values():
        assert {run.seed for run in some} == {0, 1, 2}
        assert {run.method for run in some} == set(study.VARIED)
    assert {(run.steps, run.lr) for run in conditions["twice the steps"]} == {(20, 0.5)}
    assert {(run.steps, run.lr) for run in conditions["twice the steps, a third of the rate"]} == {(20, 0.5 / 3)}
    assert {(r.suite.code, r.steps) for r in conditions["code of length 4"]} == {(4.0, 10)}
    assert {run.suite.components for run in conditions["nothing shared"]} == {32}


def test_the_command_computes_what_is_missing_and_says_the_same_again(small, arguments, tmp_path, monkeypatch):
    (tmp_path / "x.md").write_text("\n".join(["before", *marks("teachers"), "after"]))
    assert study.main(arguments) == 0
    first, page = read_json(tmp_path / "x.json"), (tmp_path / "x.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    cells = sorted((tmp_path / "runs").iterdir())
    cells[0].unlink()
    computed = []
    learn = study.learn
    monkeypatch.setattr(study, "learn", lambda run: computed.append(run) or learn(run))
    assert study.main(arguments) == 0
    assert len(computed) == 1
    assert read_json(tmp_path / "x.json") == first

    measured = {
        (run.method, run.make().settings.balance) for run in study.balanced(study.compared(rates_of(0.5), [0], 2))
    }
    assert measured == {(method, u) for method, some in study.BALANCES.items() for u in some}
    assert len(first["methods"]) == 2 * len(METHODS)
    assert all(len(row["left"]) == 2 for row in first["methods"])
    assert {len(row["tried"]) for row in first["rates"]} == {2}
    assert len(first["balance"]) == 2 * 6
    assert {row["method"] for row in first["overlap"]} == {name for name in METHODS if not name.startswith("lora")}
    assert len(first["varied"]) == 2 * (1 + len(study.VARIATIONS))
    by = {(row["suite"], row["method"]): row["left"] for row in first["methods"]}
    for row in first["paired"]:
        a, b = (by[row["suite"], name] for name in row["pair"])
        assert row["differences"] == pytest.approx([x - y for x, y in zip(a, b, strict=True)], abs=1e-4)


def test_an_interrupted_study_leaves_its_runs_and_no_figures(small, arguments, tmp_path, monkeypatch, capsys):
    asked = threading.Event()

    class Interrupted:
        def __enter__(self):
            return asked

        def __exit__(self, *error):
            return None

    learn = study.learn
    monkeypatch.setattr(study, "interruptible", Interrupted)
    monkeypatch.setattr(study, "learn", lambda run: asked.set() or learn(run))
    assert study.main(arguments) == INTERRUPTED
    assert capsys.readouterr().out == "stopped; the same command goes on\n"
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not (tmp_path / "x.json").exists()


def test_the_seed_that_chooses_rates_measures_nothing(arguments, capsys):
    with pytest.raises(SystemExit):
        study.main([*arguments, "--seeds", "0", "1000"])
    assert "chooses the rates" in capsys.readouterr().err
