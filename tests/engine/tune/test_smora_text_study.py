"""The study on text: a fair plan, runs of `anabranch tune`, and figures that follow from them."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from anabranch.common.checkpoint import read_json
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Transformer
from anabranch.models.weights import save_model
from anabranch.train.tokenizer import write_tokenizer
from anabranch.tune import smora_text_study as study
from anabranch.tune.smora_door import INTERRUPTED


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The whole command on a tiny model over bytes, with examples written here and two rates."""
    config = ModelConfig(
        family="sigma", vocab_size=258, hidden_size=16, ffn_size=16, layers=1, q_heads=1, k_heads=1, v_heads=1,
        k_dim=16, v_dim=16, max_position=128, tie_embeddings=True, bos_id=256, eos_ids=(257,),
    )  # fmt: skip
    save_model(Transformer(config).initialise(torch.Generator().manual_seed(0), std=0.2), tmp_path / "model")
    write_tokenizer(tmp_path / "model", context=128)

    def write_texts(data, out):
        out.mkdir(exist_ok=True)
        for part, text in (("train", "abcabcabc"), ("validation", "bcabca"), ("test", "cabcab")):
            (out / f"{part}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")

    monkeypatch.setattr(study, "write_texts", write_texts)
    monkeypatch.setattr(study, "RATES", (1e-3, 1e-2))
    names = {"data": tmp_path, "runs": tmp_path / "runs", "json": tmp_path / "x.json", "report": tmp_path / "x.md"}
    words = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    plot = ["--plot", str(tmp_path / "x.png")]
    return [str(tmp_path / "model"), *words, *plot, "--seeds", "0", "1", "--steps", "2", "--no-progress"]


def test_runs_of_a_seed_differ_in_method_alone(tmp_path):
    base = study.base_settings(tmp_path, tmp_path, 10)
    changed = {"out", "method", "rank", "block", "chosen", "alpha"}
    rest = {
        json.dumps({k: str(v) for k, v in asdict(study.run_of(base, method, 1, 1e-3)).items() if k not in changed})
        for method in study.METHODS
    }
    assert len(rest) == 1


def test_a_rank_in_use_has_the_same_scale_everywhere_and_eight_are_in_use(tmp_path):
    base = study.base_settings(tmp_path, tmp_path, 10)
    for method in study.METHODS:
        s = study.run_of(base, method, 0, 1e-3)
        block = s.block if s.method == "experts" else 1
        gates = s.rank if s.method == "lora" else s.chosen
        assert s.alpha / gates == 2
        assert method == "lora-64" or gates * block == 8


def test_rates_are_chosen_on_other_examples_than_methods_are_compared_on(tmp_path):
    base = study.base_settings(tmp_path, tmp_path, 10)
    held_out = [study.run_of(base, "smora", seed, 1e-3).held_out.name for seed in (study.VALIDATION, 0, 1)]
    assert held_out == ["validation.jsonl", "test.jsonl", "test.jsonl"]


def test_the_command_trains_what_is_missing_and_says_the_same_again(arguments, tmp_path, monkeypatch):
    from anabranch.tune import job

    assert study.main(arguments) == 0
    first = read_json(tmp_path / "x.json")
    (tmp_path / "runs" / "2-steps" / f"smora-lr{first['methods'][-1]['lr']:g}-seed1" / "tuning.json").unlink()
    trained = []
    tune = job.tune
    monkeypatch.setattr(job, "tune", lambda settings: trained.append(settings) or tune(settings))
    assert study.main(arguments) == 0
    assert [(s.method, s.seed, s.resume) for s in trained] == [("smora", 1, True)]
    assert read_json(tmp_path / "x.json") == first
    assert [row["method"] for row in first["methods"]] == list(study.METHODS)
    for row in first["methods"]:
        assert str(row["lr"]) == min(row["tried"], key=row["tried"].get)
        assert all(loss < first["untuned"] for loss in row["loss"])
    smora = first["methods"][-1]["loss"]
    for row, pair in zip(first["methods"], first["paired"], strict=False):
        assert pair["pair"] == ["smora", row["method"]]
        assert pair["differences"] == pytest.approx([x - y for x, y in zip(smora, row["loss"], strict=True)], abs=1e-5)
    assert "| smora minus lora-8 |" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_ends_the_study_without_figures(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "loss_of", lambda settings: None)
    assert study.main(arguments) == INTERRUPTED
    assert capsys.readouterr().out == "stopped; the same command goes on\n"
    assert not (tmp_path / "x.json").exists()


def test_a_folder_without_the_data_is_an_error_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        study.main(arguments)
    assert stop.value.code == 2
    assert "has no ag-news/test.csv.gz" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_taken_for_this_one(arguments, tmp_path):
    study.write_texts(tmp_path, tmp_path / "runs")
    run = study.run_of(study.base_settings(tmp_path / "model", tmp_path / "runs", 1), "lora-8", 0, 1e-3)
    loss = study.loss_of(run)
    assert study.loss_of(run) == loss
    with pytest.raises(ValueError, match="keeps its settings"):
        study.loss_of(replace(run, clip=0.5))
