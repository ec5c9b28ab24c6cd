"""From folder to folder: what is written, what is measured on, what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anabranch.convert import job
from anabranch.convert.evaluate import compare
from anabranch.convert.heal import Healing
from anabranch.convert.job import Outcome, convert, read_texts
from anabranch.convert.settings import ConvertSettings
from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.weights import load_model


@pytest.fixture
def settings(make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> ConvertSettings:
    return ConvertSettings(
        model=make_checkpoint("qwen2"), out=tmp_path / "out", key_heads=2, text=(str(text),), context=32, batch=2,
        warmup=2, lr=3e-3, progress=False,
    )  # fmt: skip


def test_the_folder_is_the_model_that_was_measured(settings):
    (settings.model / "LICENSE").write_text("free")
    (settings.model / "notes.bin").write_text("not taken along")
    outcome = convert(settings)
    assert outcome.key_heads == (4, 2)
    assert outcome.cache_bytes == (2 * 8 * 6 * 4, 2 * 6 * 6 * 4)
    files = {path.name for path in settings.out.iterdir()}
    assert files == {
        "config.json", "model.safetensors", "conversion.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "LICENSE",
    }  # fmt: skip
    original, converted = load_model(settings.model), load_model(settings.out)
    assert converted.config.eos_ids == original.config.eos_ids == (257,)
    texts = read_texts(settings, original.config)
    assert texts.batches is None
    assert compare(original, converted, *texts.measured) == outcome.merged
    assert outcome.merged.kl > 0.01
    tokenizer = load_tokenizer(settings.out)
    wanted = sum(len(tokenizer.encode(path.read_text())) for path in Path(settings.text[0]).iterdir()) - 1
    assert outcome.merged.tokens == wanted  # all of the text, when nothing is trained
    report = json.loads((settings.out / "conversion.json").read_text())
    assert report["merged"]["kl"] == outcome.merged.kl
    assert report["command"].startswith("anabranch convert ")


def test_healing_is_measured_on_text_it_never_saw(settings):
    outcome = convert(replace(settings, heal=40))
    assert outcome.steps == 40
    assert outcome.healed.kl < 0.8 * outcome.merged.kl
    assert outcome.healed.tokens == outcome.merged.tokens
    texts = read_texts(replace(settings, heal=40), load_model(settings.model).config)
    trained = bytes(texts.batches.stream.tolist()).decode()
    inputs, targets = texts.measured
    held = bytes(token for token in targets.flatten().tolist() if 0 <= token < 256).decode()
    lines = set(held.splitlines()[1:])
    assert lines
    assert not lines & set(trained.splitlines())
    assert load_model(settings.out).config.k_heads == 2
    again = compare(load_model(settings.model), load_model(settings.out), inputs, targets)
    assert again == outcome.healed


def test_no_text_needs_no_tokenizer(settings):
    (settings.model / "tokenizer.json").unlink()
    outcome = convert(replace(settings, text=()))
    assert (outcome.merged, outcome.healed) == (None, None)
    assert load_model(settings.out).config.k_heads == 2
    with pytest.raises(ValueError, match="has no tokenizer to read text with"):
        convert(replace(settings, out=settings.out / "other"))


def test_calibration_is_used_and_never_on_what_is_measured(settings, tmp_path, text):
    (tmp_path / "other.txt").write_text("Another text, about rivers and their arms.\n" * 5)
    plain = convert(replace(settings, out=tmp_path / "plain"))
    calibrated = convert(replace(settings, out=tmp_path / "calibrated", calibrate=(str(tmp_path / "other.txt"),)))
    assert calibrated.merged != plain.merged
    with pytest.raises(ValueError, match="calibration text contains text that the result is measured on"):
        convert(replace(settings, calibrate=(str(text / "3.txt"),)))
    whole = "".join(path.read_text() for path in sorted(text.iterdir()))
    (tmp_path / "whole.txt").write_text(whole)
    with pytest.raises(ValueError, match="calibration text contains"):
        convert(replace(settings, heal=5, calibrate=(str(tmp_path / "whole.txt"),)))


def test_an_interrupted_healing_leaves_no_model_and_goes_on(settings, tmp_path, monkeypatch):
    whole = replace(settings, heal=8, out=tmp_path / "whole")
    expected = convert(whole)
    take_step = Healing.take_step

    class Stopping(Healing):
        def take_step(self) -> None:
            take_step(self)
            if self.progress.step == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

    parts = replace(settings, heal=8)
    monkeypatch.setattr(job, "Healing", Stopping)
    outcome = convert(parts)
    monkeypatch.undo()
    assert (outcome.interrupted, outcome.steps, outcome.healed) == (True, 3, None)
    assert not (settings.out / "config.json").exists()
    again = convert(replace(parts, resume=True))
    assert replace(again, seconds=0.0) == replace(expected, seconds=0.0)
    for name, tensor in load_model(whole.out).state_dict().items():
        assert torch.equal(load_model(settings.out).state_dict()[name], tensor), name


def test_a_process_killed_while_healing_loses_little(settings, tmp_path):
    """SIGKILL between two steps; what was saved is whole, and the end is that of a run left alone."""
    expected = convert(replace(settings, heal=8, out=tmp_path / "whole"))
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from anabranch.convert import job; from anabranch.convert.heal import Healing\n"
        "from anabranch.convert.settings import ConvertSettings\n"
        "step = Healing.take_step\n"
        "def die(self):\n"
        "    if self.progress.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self)\n"
        "Healing.take_step = die\n"
        "job.convert(ConvertSettings(model=Path(sys.argv[1]), out=Path(sys.argv[2]), key_heads=2, heal=8, batch=2,\n"
        "    text=(sys.argv[3],), context=32, warmup=2, lr=3e-3, progress=False, checkpoint_every_s=0.0))"
    )
    command = [sys.executable, "-c", script, str(settings.model), str(settings.out), settings.text[0]]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (settings.out / "config.json").exists()
    again = convert(replace(settings, heal=8, resume=True))
    assert replace(again, seconds=0.0) == replace(expected, seconds=0.0)


def test_as_many_heads_agree_in_every_bit_and_need_no_healing(settings):
    outcome = convert(replace(settings, key_heads=4, heal=10))
    assert (outcome.merged.kl, outcome.merged.same_top, outcome.healed, outcome.steps) == (0.0, 1.0, None, 0)
    assert not settings.state_folder.exists()


def test_what_cannot_work_is_refused_before_anything_is_written(settings, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for changes, message in (
        ({"key_heads": 3}, r"one of \[1, 2, 4\], got 3"),
        ({"model": tmp_path / "nowhere"}, "no model folder at"),
        ({"text": (str(tmp_path / "nothing.txt"),)}, "no such file or folder"),
        ({"text": (str(tmp_path / "empty.txt"),)}, "the corpus is empty"),
        ({"context": 65}, "context must be at most the model's 64 positions, got 65"),
        ({"heal": 50, "text": (str(tmp_path / "text" / "0.txt"),), "context": 64, "held_out": 0.9}, "shorter than"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(replace(settings, **{"warmup": 2, **changes}))
        assert not settings.out.exists()


def test_a_model_is_never_overwritten(settings):
    convert(replace(settings, text=()))
    with pytest.raises(ValueError, match="already holds a model"):
        convert(settings)
    with pytest.raises(ValueError, match="already holds a model"):
        convert(replace(settings, out=settings.model))


def test_a_file_cut_within_a_character_is_read(settings, tmp_path):
    path = tmp_path / "rivers.txt"
    path.write_text("é" * 500)  # two bytes each: an odd share cuts one
    texts = read_texts(replace(settings, text=(str(path),), heal=5, held_out=0.101), load_model(settings.model).config)
    assert texts.batches.stream.numel() == 898  # of 899 bytes before the cut
    assert int((texts.measured[1] != -100).sum()) == 99  # of 101 bytes after it, less the first


def test_a_picture_is_drawn(settings):
    outcome: Outcome = convert(replace(settings, heal=4, plot=True))
    assert outcome.healed is not None
    assert (settings.out / "healing.png").read_bytes().startswith(b"\x89PNG")
