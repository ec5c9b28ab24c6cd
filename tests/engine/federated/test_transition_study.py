"""The study of transition matrices: what it measures where the answer is plain, its verdicts, and its command."""

import json
import math
from dataclasses import replace

import pytest
import torch

from anabranch.federated import transition_study
from anabranch.federated.methods.causal_transition import CausalTransition
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found
from anabranch.federated.schedule import Schedule
from anabranch.labels.noise import counted_matrix


def perfect(swapped):
    """A model that knows the classes, whose heads know the columns of x2, where a third of the labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(60) % 5
    y = torch.where(torch.arange(60) % 3 == 0, (clean + 1) % 5, clean)
    x = torch.nn.functional.one_hot(clean, 20).float()
    task = transition_study.Task(Holdings(x, y, [torch.randperm(60, generator=generator)]), clean, x, clean)
    method = CausalTransition(factors=20)
    f = found(method, MLP((20, 5)), task.holdings, Schedule())
    views = f.network.layout.views(f.server["model"])
    views["0.weight"].zero_()
    views["0.weight"][:, :5] = (-1 if swapped else 1) * 9 * torch.eye(5)
    views["separation.bias"].copy_(torch.cat([torch.full((10,), -4.0), torch.linspace(-3, 3, 10)]))
    return f, method, task


def test_measures_of_a_model_that_knows():
    f, method, task = perfect(swapped=False)
    f.server = {**f.server, "transition": counted_matrix(task.clean, task.holdings.y, 5).float()}
    told = transition_study.known(f, method, task)
    assert told["wrong"] == told["parts"] == 1.0
    assert told["apart"] == pytest.approx(0, abs=1e-6)
    assert told["diagonal"] == pytest.approx(math.exp(4) / (math.exp(4) + 4), rel=1e-2)
    f, method, task = perfect(swapped=True)
    assert transition_study.known(f, method, task)["wrong"] < 0.1


def test_without_wrong_labels_there_is_no_area():
    assert transition_study.area(torch.rand(4), torch.zeros(4, dtype=torch.bool)) is None


def test_a_check_holds_if_its_interval_does():
    def results(apart):
        return [
            {"noise": "instance:0.4", "method": name, "seed": seed, "accuracy": accuracy, "wrong": 0.9}
            for seed, more in enumerate(apart)
            for name, accuracy in (("CE", 0.7), ("ours", 0.7 + more), ("forward", 0.5), ("forward, anchors", 0.5))
        ]

    some = [check for check in transition_study.CHECKS if check.noise == "instance:0.4"]
    for apart, verdict in (([0.05, 0.06, 0.05], "yes"), ([0.0, 0.1, 0.05], "in the mean"), ([0.0, 0.02, 0.01], "no")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transition_study, "CHECKS", some)
            told = transition_study.checked(results(apart))
        assert told[0]["holds"] == verdict
        assert told[0]["mean"] == pytest.approx(sum(apart) / 3, abs=1e-4)
        assert {one["holds"] for one in told[1:]} == {"yes"}


def test_the_command_writes_figures_and_tables(tmp_path, monkeypatch, capsys):
    for name in ("DIGITS", "MANY_CLIENTS", "PARTED"):
        short = replace(getattr(transition_study, name), rounds=2, epochs=1)
        monkeypatch.setattr(transition_study, name, short)
    ours = "causal-transition:warm_up=1,factors=20"
    monkeypatch.setattr(transition_study, "LEARNED", 200)
    monkeypatch.setattr(transition_study, "SETTINGS", {
        ("instance:0.4@half,pairflip:0.3@half", 10): {"CE": "fedavg", "ours": ours},
        (transition_study.TWO_PARTS, 1): {"CE": "fedavg", "ours": ours},
    })  # fmt: skip
    monkeypatch.setattr(transition_study, "CHECKS", transition_study.CHECKS[-1:])
    arguments = ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "b.md"), "--seeds", "3", "4"]
    assert transition_study.main([*arguments, "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in (tmp_path / "b.md").read_text()
    assert "| two parts | 1 | ours |" in printed
    figures = json.loads((tmp_path / "a.json").read_text())
    order = [(run["seed"], run["clients"], run["method"]) for run in figures["runs"]]
    assert order == [(seed, clients, name) for seed in (3, 4) for clients in (10, 1) for name in ("CE", "ours")]
    assert all(0 <= run["parts"] <= 1 for run in figures["runs"] if "parts" in run)
