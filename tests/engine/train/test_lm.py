"""Training runs: they learn, they resume bitwise, they refuse what cannot work."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from anabranch.common import run_state
from anabranch.data.stream import held_out_windows
from anabranch.data.text_files import find_files
from anabranch.models.transformer import Transformer
from anabranch.models.weights import load_model
from anabranch.train.corpus import read_corpus
from anabranch.train.lm import bits_per_byte, model_config, token_loss, train
from anabranch.train.settings import LMSettings

LINE = b"def add(a, b):\n    return a + b\n\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of texts that repeat themselves, one of which will be held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.py").write_bytes(LINE * (20 + i))
    return folder


def tiny(text: Path, out: Path, **changes: object) -> LMSettings:
    settings = LMSettings(
        out=out,
        text=(str(text),),
        held_out=0.1,
        hidden_size=32,
        ffn_size=32,
        layers=2,
        q_heads=4,
        k_heads=1,
        v_heads=2,
        head_dim=8,
        q_intermediate_size=16,
        augq_residual=False,
        lr=3e-3,
        context=32,
        batch=4,
        steps=12,
        warmup=2,
        log_every=3,
        evaluate_every=6,
        evaluate_windows=4,
        progress=False,
    )
    return replace(settings, **changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def log(out: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def test_the_loss_falls_on_a_text_that_repeats_itself(text, tmp_path):
    outcome = train(tiny(text, tmp_path / "run", steps=100, lr=1e-2, log_every=20, evaluate_every=20))
    losses = [entry["train_bits_per_token"] for entry in log(tmp_path / "run")]
    assert losses[0] > 2  # the mean of the first 20 steps, from 8 bits on; a byte of this text's 15 costs at most 4
    assert losses[-1] < 0.5
    assert outcome.stopped is None
    assert outcome.held_out_bits_per_byte < 0.5
    assert abs(outcome.stored_bits_per_byte - outcome.held_out_bits_per_byte) < 0.1  # bfloat16 keeps 8 bits


def test_the_folder_is_a_model_that_gives_the_reported_bits(text, tmp_path):
    outcome = train(tiny(text, tmp_path / "run", weights="float32"))
    model = load_model(tmp_path / "run")
    corpus = read_corpus(find_files([str(text)]), held_out=0.1)
    got = bits_per_byte(model, *held_out_windows(corpus.held_out, 32))
    assert got == pytest.approx(outcome.held_out_bits_per_byte, abs=1e-4)
    report = json.loads((tmp_path / "run" / "training.json").read_text())
    assert report["corpus"]["sha256"] == corpus.sha256
    assert report["steps"] == 12
    assert report["tokens"] == 12 * 4 * 32
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model_type"], config["num_key_heads"], config["num_value_heads"]) == ("sigma", 1, 2)


def test_a_run_resumed_after_every_step_is_bitwise_an_uninterrupted_one(text, tmp_path):
    """A time limit of nothing stops after each step."""
    whole, parts = tiny(text, tmp_path / "whole"), tiny(text, tmp_path / "parts", time_limit_s=0.0)
    expected = train(whole)
    outcome = train(parts)
    resumed = 0
    while outcome.stopped is not None:
        assert outcome.stopped == "time limit"
        outcome = train(replace(parts, resume=True))
        resumed += 1
    assert resumed == 11
    assert outcome == expected
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], tensor), name
    checkpoints = [load_file(next((run / "checkpoint").glob("*.safetensors"))) for run in (parts.out, whole.out)]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for name in checkpoints[0]:
        assert torch.equal(checkpoints[0][name], checkpoints[1][name]), name


def test_log_entries_after_the_last_checkpoint_are_written_once(text, tmp_path):
    run = tiny(text, tmp_path / "run")
    train(run)
    path = tmp_path / "run" / "loss.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"step": 15, "tokens": 1, "train_bits_per_token": 1.0}) + "\n")
    train(replace(run, resume=True))
    assert path.read_text() == before


def test_a_finished_run_can_be_made_longer_and_says_so(text, tmp_path):
    run = tiny(text, tmp_path / "run")
    train(run)
    assert train(replace(run, resume=True, steps=15)).steps == 15
    assert json.loads((tmp_path / "run" / "training.json").read_text())["schedules"] == [[0, 12], [12, 15]]


def test_ctrl_c_saves_a_checkpoint_that_resumes(text, tmp_path):
    settings = tiny(text, tmp_path / "run", steps=100_000, checkpoint_every_s=1e9)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    outcome = train(settings)
    assert outcome.stopped == "interrupted"
    assert 0 < outcome.steps < 100_000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = train(replace(settings, resume=True, steps=outcome.steps + 2))
    assert again.stopped is None


def test_every_parameter_gets_a_gradient(text, tmp_path):
    model = Transformer(model_config(tiny(text, tmp_path))).initialise(torch.Generator().manual_seed(0), 0.2)
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    token_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        rows = parameter.grad.flatten(1).abs().sum(1) if parameter.ndim > 1 else parameter.grad.abs()
        assert (rows > 0).all(), name


def test_the_loss_is_cross_entropy_of_the_next_byte(text, tmp_path):
    model = Transformer(model_config(tiny(text, tmp_path))).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.zero_()  # tied: all logits are zero, so every token costs log 258
    loss = token_loss(model, torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 2, -100, 3, 4]] * 2))
    assert_close(loss, torch.tensor(258.0).log())


def test_a_folder_with_a_run_is_not_overwritten(text, tmp_path):
    train(tiny(text, tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(text, tmp_path / "run"))


def test_nothing_to_resume_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        train(tiny(text, tmp_path / "run", resume=True))


def test_another_run_cannot_be_resumed(text, tmp_path):
    run = tiny(text, tmp_path / "run")
    train(run)
    with pytest.raises(ValueError, match=r"except steps; lr is 0.5, was 0.003; seed is 1, was 0"):
        train(replace(run, resume=True, lr=0.5, seed=1))
    (text / "new.py").write_bytes(b"more = 1\n")
    with pytest.raises(ValueError, match="the text has changed"):
        train(replace(run, resume=True))


def test_a_text_shorter_than_the_context_is_refused(tmp_path):
    (tmp_path / "short.py").write_bytes(b"x = 1\n")
    with pytest.raises(ValueError, match="shorter than the context"):
        train(tiny(tmp_path / "short.py", tmp_path / "run"))


def test_heads_that_do_not_divide_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="Hq must be a multiple"):
        train(tiny(text, tmp_path / "run", v_heads=3))


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    with pytest.raises(ValueError, match="smaller lr"):
        train(tiny(text, tmp_path / "run", lr=1e30, warmup=0))


def test_a_plot_without_matplotlib_names_the_extra_before_training(text, tmp_path):
    """Without --plot nothing imports matplotlib; with it the error comes before the first step."""
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from pathlib import Path; from anabranch.train.settings import LMSettings\n"
        "from anabranch.train.lm import train\n"
        "train(LMSettings(out=Path(sys.argv[1]), plot=True))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ImportError: drawing needs matplotlib: pip install 'anabranch[plot]'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_plot_is_a_small_png(text, tmp_path):
    train(tiny(text, tmp_path / "run", plot=True))
    picture = (tmp_path / "run" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000


def test_a_checkpoint_that_was_not_completed_is_ignored(text, tmp_path):
    run = tiny(text, tmp_path / "run")
    train(run)
    (tmp_path / "run" / "checkpoint" / "step-00000013.safetensors").write_bytes(b"half")
    assert run_state.exists(tmp_path / "run")
    assert train(replace(run, resume=True)).steps == 12
