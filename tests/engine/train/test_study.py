"""The study of head counts: its arithmetic, its wording, and that it goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.common.checkpoint import read_json, write_json
from anabranch.train import study
from anabranch.train.settings import LMSettings


def finish(settings: LMSettings, bits: float) -> None:
    """Write the report that a finished run leaves."""
    settings.out.mkdir(parents=True)
    report = {
        "recipe": settings.recipe(),
        "stopped": None,
        "held_out_bits_per_byte": bits,
        "tokens": 1000,
        "seconds": 1.0,
        "corpus": {"sha256": "abc"},
        "python": "3",
        "torch": "2",
        "parameters": 10,
    }
    write_json(settings.out / "training.json", report)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    bits = {"fewer-k": (2.0, 2.1, 2.2), "equal": (1.99, 2.10, 2.18), "fewer-v": (2.5, 2.61, 2.69)}
    for variant in study.VARIANTS:
        for seed, value in enumerate(bits[variant.name]):
            finish(study.settings_for(variant, seed, tmp_path, steps=5), value)
    return tmp_path


def test_variants_of_a_seed_differ_in_heads_alone(tmp_path):
    recipes = [study.settings_for(variant, 1, tmp_path, steps=5).recipe() for variant in study.VARIANTS]
    heads = [(recipe.pop("k_heads"), recipe.pop("v_heads")) for recipe in recipes]
    assert heads == [(2, 8), (8, 8), (8, 2)]
    assert recipes[0] == recipes[1] == recipes[2]


def test_figures_are_paired_by_seed(runs):
    figures = study.collect(runs, [0, 1, 2], 5)
    pairs = {tuple(pair["pair"]): pair for pair in figures["paired"]}
    assert pairs["fewer-k", "equal"]["differences"] == [0.01, 0.0, 0.02]
    assert pairs["fewer-v", "fewer-k"]["differences"] == [0.5, 0.51, 0.49]
    assert [v["cached_numbers_per_token"] for v in figures["variants"]] == [320, 512, 320]


def test_the_reading_follows_from_the_interval(runs):
    text = study.markdown(study.collect(runs, [0, 1, 2], 5))
    assert "**fewer-k** and **equal** cannot be told apart" in text
    assert "**fewer-v** is worse than **fewer-k** by 0.5000 bits per byte" in text
    assert "| fewer-v | 8/8/2 | 10 | 320 | 2.5000 | 2.6100 | 2.6900 | 2.6000 | 0.0954 |" in text


def test_one_seed_claims_nothing(runs):
    figures = study.collect(runs, [0], 5)
    assert figures["variants"][0]["sd"] is None
    assert all("cannot be told apart" in study.reading(pair) for pair in figures["paired"])


def test_only_seeds_that_all_variants_finished_are_compared(runs):
    path = runs / "5-steps" / "fewer-v-seed1" / "training.json"
    write_json(path, {**read_json(path), "stopped": "time limit"})
    assert study.collect(runs, [0, 1, 2], 5)["seeds"] == [0, 2]
    with pytest.raises(ValueError, match=r"no seed of \[1\]"):
        study.collect(runs, [1], 5)


def test_runs_on_different_texts_are_not_compared(runs):
    path = runs / "5-steps" / "equal-seed2" / "training.json"
    write_json(path, {**read_json(path), "corpus": {"sha256": "other"}})
    with pytest.raises(ValueError, match="different texts"):
        study.collect(runs, [0, 1, 2], 5)


def test_the_command_trains_what_is_missing_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.py").write_bytes(b"def add(a, b):\n    return a + b\n" * 200)
    whole = study.settings_for

    def smaller(*args: object, **named: object) -> LMSettings:
        size = {"hidden_size": 16, "ffn_size": 16, "layers": 1, "head_dim": 2, "context": 16}
        text = (str(tmp_path / "text.py"),)
        return replace(whole(*args, **named), text=text, log_every=1, progress=False, **size)

    monkeypatch.setattr(study, "settings_for", smaller)
    names = {"runs": tmp_path / "runs", "json": tmp_path / "figures.json", "report": tmp_path / "page.md"}
    arguments = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    arguments += ["--steps", "2", "--seeds", "0", "1"]
    assert study.main(arguments) == 0
    first = read_json(names["json"])
    assert capsys.readouterr().out.count(", seed ") == 6
    (tmp_path / "runs" / "2-steps" / "equal-seed1" / "training.json").unlink()
    assert study.main(arguments) == 0
    assert "equal, seed 1, 2 steps" in capsys.readouterr().out
    again = read_json(names["json"])
    bits = [[v["bits_per_byte"] for v in figures["variants"]] for figures in (first, again)]
    assert bits[0] == bits[1]
    assert "Each run took 2 steps" in names["report"].read_text()
