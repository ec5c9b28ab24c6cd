"""Tuning runs: they learn, stop and go on with the same bits, and processes together do what one does."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from anabranch.adapters.files import load_adapters
from anabranch.data.instructions import Example
from anabranch.data.packing import Packs
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model
from anabranch.train.tokenizer import write_tokenizer
from anabranch.tune import job as tuning
from anabranch.tune.job import mean_loss, packed_loss, tune
from anabranch.tune.settings import TuneSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model over bytes."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        family="sigma", vocab_size=258, hidden_size=32, ffn_size=48, layers=2, q_heads=2, k_heads=1, v_heads=2,
        k_dim=16, v_dim=16, max_position=64, tie_embeddings=True, bos_id=256, eos_ids=(257,),
    )  # fmt: skip
    save_model(Transformer(config).initialise(torch.Generator().manual_seed(0), std=0.2), folder)
    write_tokenizer(folder, context=64)
    return folder


@pytest.fixture
def settings(model, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return TuneSettings(
        model=model, data=(data,), held_out=data, out=tmp_path / "out", rank=4, context=32, batch=2, steps=12, lr=1e-2,
        growth_every=2, evaluate_every=6, progress=False,
    )  # fmt: skip


def test_packed_examples_do_not_see_each_other(model):
    network = load_model(model)
    examples = [Example([5, 6, 7, 8], [False, False, True, True]), Example([9, 8, 7], [False, True, True])]
    together = Packs(examples, context=8, batch=1, seed=0).at(0)
    assert together.segments == [[3, 2, 3]] or together.segments == [[2, 3, 3]]
    alone = 0.0
    for one in examples:
        ids, T = torch.tensor(one.ids), len(one.ids) - 1
        scores = network.logits(network(ids[:-1], torch.arange(T), DenseAttend(1))).log_softmax(1)
        alone -= sum(float(scores[t, one.ids[t + 1]]) for t in range(T) if one.learnt[t + 1])
    assert float(packed_loss(network, together)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "experts", "smora", "triadapt", "adalora"])
def test_every_method_learns_and_what_it_wrote_computes_what_it_measured(settings, method):
    outcome = tune(replace(settings, method=method, block=2, steps=25, evaluate_every=25))
    log = [json.loads(line) for line in (settings.out / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]
    network = load_model(settings.model)
    load_adapters(network, settings.out)
    tokenizer = tuning.load_tokenizer(settings.model)
    packs = Packs(tuning.read_examples(settings.data, tokenizer), context=32, batch=2, seed=0)
    assert mean_loss(network, packs) == pytest.approx(outcome.held_out_loss, abs=2e-5)  # rounded to 5 digits
    if method == "triadapt":
        assert max(outcome.ranks.values()) > 1
    if method == "adalora":
        assert sum(outcome.ranks.values()) == 4 * len(outcome.ranks)


@pytest.mark.parametrize(("method", "stop"), [("smora", 5), ("triadapt", 5), ("adalora", 5), ("adalora", 9)])
def test_a_stopped_run_goes_on_with_the_same_bits(settings, method, stop, monkeypatch):
    settings = replace(settings, method=method, orthogonality=0.1)
    tune(settings)
    whole = load_file(settings.out / "adapter_model.safetensors")
    steps = iter(range(100))
    monkeypatch.setattr(tuning._Run, "all_agree", lambda run, interrupted: next(steps) == stop)
    parts = replace(settings, out=settings.out.with_name("parts"))
    outcome = tune(parts)
    assert (outcome.interrupted, outcome.steps) == (True, stop)
    assert not (parts.out / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds a run"):
        tune(parts)
    with pytest.raises(ValueError, match=r"lr is 0\.5, was 0\.01"):
        tune(replace(parts, resume=True, lr=0.5))
    tune(replace(parts, resume=True))
    again = load_file(parts.out / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("method", ["smora", "triadapt", "adalora"])
def test_two_processes_do_what_one_does_with_twice_the_passes(settings, method, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "anabranch",
        "tune", str(settings.model), "--data", str(settings.held_out), "--out", str(tmp_path / "two"), "--rank", "4",
        "--method", method, "--context", "32", "--batch", "2", "--steps", "6", "--lr", "1e-3", "--growth-every", "2",
        "--orthogonality", "0.1", "--no-progress", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    one = tune(replace(settings, method=method, steps=6, lr=1e-3, accumulate=2, held_out=None, orthogonality=0.1))
    assert said["ranks"] == one.ranks
    assert said["train_loss"] == pytest.approx(one.train_loss, abs=2e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (settings.out, tmp_path / "two"))
    for name, x in ours.items():
        # Sums in another order: AdamW divides small gradients by their own size, so a step may differ by a share of lr.
        torch.testing.assert_close(theirs[name], x, rtol=1e-3, atol=1e-4)


def test_a_loss_that_explodes_is_no_result(settings):
    with pytest.raises(ValueError, match="the loss became"):
        tune(replace(settings, lr=1e30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dora"}, "unknown method 'dora'; choose one of"),
        ({"orthogonality": -0.1}, "orthogonality must not be negative"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"targets": ()}, "targets must name"),
        ({"data": ()}, "data must name"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)
