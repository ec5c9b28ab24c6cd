"""Sorting texts with adapters: the files as published, what is missing, and that it learns."""

import csv
import gzip

import pytest
import torch

from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Transformer
from anabranch.models.weights import save_model
from anabranch.train.tokenizer import write_tokenizer
from anabranch.tune import rank_texts
from anabranch.tune.rank_texts import TextSettings, learn, read, variants

SMALL = TextSettings(reference=2, steps=30, batch=8, tokens=12, lr=2e-2, looks=6, measured=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        family="sigma", vocab_size=258, hidden_size=16, ffn_size=24, layers=2, q_heads=2, k_heads=1, v_heads=2,
        k_dim=8, v_dim=8, max_position=64, tie_embeddings=True, bos_id=256, eos_ids=(257,),
    )  # fmt: skip
    save_model(Transformer(config).initialise(torch.Generator().manual_seed(0), std=0.3), folder)
    write_tokenizer(folder, context=64)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Both tasks, laid out as they are published; a text's letters tell its class."""
    monkeypatch.setattr(rank_texts, "HELD_OUT", 40)
    for folder in ("ag-news", "banking77"):
        (tmp_path / folder).mkdir()
    with gzip.open(tmp_path / "ag-news" / "test.csv.gz", "wt", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
            [str(1 + n % 4), "abcd"[n % 4] * 3, f'"{n}", he said'] for n in range(160)
        )
    for name, rows in (("train", 80), ("test", 40)):
        with gzip.open(tmp_path / "banking77" / f"{name}.csv.gz", "wt", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([f"{'xyz'[n % 3] * 4}, {n}?", f"about {'xyz'[n % 3]}"] for n in range(rows))
    return tmp_path


def test_both_tasks_are_read_and_ag_news_is_split_alike_each_time(model, data):
    news, bank = (read(data, task, model, 12) for task in rank_texts.TASKS)
    assert (len(news.train), len(news.held_out), news.classes) == (120, 40, 4)
    assert (len(bank.train), len(bank.held_out), bank.classes) == (80, 40, 3)
    assert all(len(ids) <= 12 and ids[0] == ord("abcd"[label]) for ids, label in news.train)
    assert read(data, "ag-news", model, 12) == news


def test_a_missing_file_is_named(model, data):
    (data / "banking77" / "test.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"banking77 needs .*test\.csv\.gz; give the folder of data sets with --data"):
        read(data, "banking77", model, 12)


@pytest.mark.parametrize("method", ["LoRA-2", "TriAdapt", "AdaLoRA"])
def test_each_method_learns_to_sort(model, data, method):
    made = variants(SMALL)[method]
    run = learn(SMALL, model, read(data, "ag-news", model, 12), "ag-news", method, made, 0)
    assert run.accuracy > 0.6  # chance is a quarter
    if method == "LoRA-2":
        assert run.ranks == {}
    else:
        assert list(run.ranks)[:2] == ["0.self_attn.q_proj", "0.self_attn.k_proj"]
        assert len(run.ranks) < sum(run.ranks.values()) <= 2 * len(run.ranks)
