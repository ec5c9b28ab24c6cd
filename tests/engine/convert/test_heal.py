"""Healing brings a model closer to its original, stops anywhere and goes on as if it had not."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anabranch.common import run_state
from anabranch.convert.heal import Healing, fingerprint, healing_loss
from anabranch.convert.model import convert_model
from anabranch.convert.settings import ConvertSettings
from anabranch.data.stream import Batches, held_out_windows
from anabranch.models.transformer import Transformer
from anabranch.models.weights import load_model

START = (
    ConvertSettings(
        model=Path("unused"), out=Path("unused"), key_heads=1, text=("unused",), heal=12, batch=2, context=16, warmup=2,
        lr=3e-3, evaluate_every=6, progress=False,
    )
)  # fmt: skip


@pytest.fixture
def models(make_checkpoint: Callable[..., Path]) -> tuple[Transformer, Transformer]:
    original = load_model(make_checkpoint("llama"))
    return original, convert_model(original, 1).model


@pytest.fixture
def heal(models, tmp_path) -> Callable[..., Healing]:
    """`heal(name, **settings)`: healing of the converted model on few random tokens, its state in a folder."""
    generator = torch.Generator().manual_seed(3)
    stream, held = (torch.randint(12, (n,), generator=generator) for n in (4000, 400))

    def make(name: str, *, texts: str = "text", **changes: object) -> Healing:
        settings = replace(START, out=tmp_path / name, **changes)
        batches = Batches(stream=stream, context=16, batch=settings.batch, seed=settings.seed)
        return Healing(settings, *models, batches=batches, probe=held_out_windows(held, 16), texts=texts)

    return make


class AfterSteps(threading.Event):
    """An event that is set when it has been looked at so many times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def log(healing: Healing) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in healing.log.read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@torch.no_grad()
def losses(*arguments: Any) -> list[float]:
    """The loss with both parts, and the divergence alone."""
    return [float(x) for x in healing_loss(*arguments)]


@pytest.mark.parametrize("attention_mse", [0.0, 1.0])
def test_the_divergence_falls(attention_mse: float, heal):
    run = heal("run", heal=120, batch=8, attention_mse=attention_mse)
    inputs, _ = run.probe
    before = losses(run.original, run.student, inputs, 1.0)
    assert run.loop(threading.Event())
    after = losses(run.original, run.student, inputs, 1.0)
    assert after[1] < 0.6 * before[1]  # of text that was never trained on
    if attention_mse:
        assert after[0] - after[1] < before[0] - before[1]
    measured = [entry["held_out_kl"] for entry in log(run) if "held_out_kl" in entry]
    assert (measured[0], measured[-1]) == (pytest.approx(before[1], rel=0.1), pytest.approx(after[1], rel=0.1))


def test_a_run_stopped_after_every_step_gives_every_bit_of_one_that_was_not(heal):
    whole = heal("whole")
    assert whole.loop(threading.Event())
    parts = heal("parts")
    stops = 0
    while not parts.loop(AfterSteps(1)):
        stops += 1
        assert parts.progress.step == stops
        parts = heal("parts", resume=True)
    assert stops == 11
    for name, tensor in whole.result().state_dict().items():
        assert torch.equal(parts.result().state_dict()[name], tensor), name
    assert log(parts) == log(whole)
    states = [load_file(next((run.folder / "checkpoint").glob("*.safetensors"))) for run in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_killed_run_loses_what_came_after_its_checkpoint_and_no_more(heal, monkeypatch):
    whole = heal("whole")
    whole.loop(threading.Event())
    run = heal("killed", checkpoint_every_s=0.0)
    take_step = Healing.take_step

    def die(self: Healing) -> None:
        if self.progress.step == 7:
            raise SystemExit
        take_step(self)

    monkeypatch.setattr(Healing, "take_step", die)
    with pytest.raises(SystemExit):
        run.loop(threading.Event())
    monkeypatch.undo()
    again = heal("killed", resume=True)
    assert again.progress.step == 7
    again.loop(threading.Event())
    for name, tensor in whole.result().state_dict().items():
        assert torch.equal(again.result().state_dict()[name], tensor), name
    assert log(again) == log(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(heal, monkeypatch):
    def die(self: Healing) -> None:
        raise SystemExit

    run = heal("killed")
    monkeypatch.setattr(Healing, "take_step", die)
    with pytest.raises(SystemExit):
        run.loop(threading.Event())
    monkeypatch.undo()
    assert run.log.exists()
    again = heal("killed")
    assert again.loop(threading.Event())
    assert [entry["step"] for entry in log(again)] == [0, 6, 10, 12]


def test_the_loss_of_the_original_itself_is_nothing(models):
    original, converted = models
    inputs = torch.randint(258, (2, 16), generator=torch.Generator().manual_seed(4))
    own = healing_loss(original, original, inputs, 1.0)[0].detach()
    assert abs(float(own)) < 1e-5  # the student's products are torch's, the original's our kernel's
    loss, kl = losses(original, converted, inputs, 0.5)
    twice, same = losses(original, converted, inputs, 1.0)
    assert same == kl > 0.01
    assert twice - kl == pytest.approx(2 * (loss - kl))
    assert loss - kl > 0.01


def test_every_weight_learns_and_the_original_does_not(models):
    original, converted = models
    healing_loss(original, converted, torch.arange(32).view(2, 16), 0.0)[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in converted.parameters())
    assert all(parameter.grad is None for parameter in original.parameters())


def test_the_result_has_the_dtype_of_the_original(models, heal, tmp_path):
    original, converted = (model.bfloat16() for model in models)
    run = Healing(
        replace(START, out=tmp_path / "half"), original, converted, batches=heal("x").batches, probe=heal("y").probe,
        texts="text",
    )  # fmt: skip
    run.loop(AfterSteps(2))
    assert {parameter.dtype for parameter in run.student.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in run.result().parameters()} == {torch.bfloat16}


def test_another_run_cannot_be_resumed(heal, models):
    heal("run").loop(AfterSteps(2))
    with pytest.raises(ValueError, match="already holds a run"):
        heal("run")
    with pytest.raises(ValueError, match=r"except steps; lr is 0.1, was 0.003"):
        heal("run", resume=True, lr=0.1)
    with pytest.raises(ValueError, match="the text has changed"):
        heal("run", resume=True, texts="other")
    with torch.no_grad():
        models[0].norm[0] += 1
    with pytest.raises(ValueError, match="except steps; model is"):
        heal("run", resume=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        heal("none", resume=True)


def test_the_schedule_may_be_made_longer(heal):
    heal("run").loop(threading.Event())
    longer = heal("run", resume=True, heal=15)
    assert longer.loop(threading.Event())
    assert longer.progress.schedules == [[0, 12], [12, 15]]
    assert run_state.exists(longer.folder)


def test_a_loss_that_is_not_finite_stops_the_run(heal):
    with pytest.raises(ValueError, match="smaller lr"):
        heal("run", lr=1e30, warmup=0).loop(threading.Event())


def test_the_state_may_lie_elsewhere(heal, tmp_path):
    run = heal("run", state=tmp_path / "elsewhere")
    run.loop(AfterSteps(1))
    assert run_state.exists(tmp_path / "elsewhere")
    assert not (tmp_path / "run").exists()


def test_a_fingerprint_knows_every_weight(models):
    before = fingerprint(models[0])
    with torch.no_grad():
        models[0].blocks[1].down.weight[3, 5] += 1e-3
    assert fingerprint(models[0]) != before != fingerprint(models[1])
