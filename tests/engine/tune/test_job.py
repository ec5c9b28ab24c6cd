"""Tuning runs: they learn, stop and go on with the same bits, and processes together do what one does."""

import json
import math
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

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


def log(folder):
    """Rows of a log without what the clock says."""
    lines = (folder / "loss.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


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
    rows = log(settings.out)
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    network = load_model(settings.model)
    load_adapters(network, settings.out)
    tokenizer = tuning.load_tokenizer(settings.model)
    packs = Packs(tuning.read_examples(settings.data, tokenizer), context=32, batch=2, seed=0)
    assert mean_loss(network, packs) == pytest.approx(outcome.held_out_loss, abs=2e-5)  # rounded to 5 digits
    assert outcome.held_out_perplexity == pytest.approx(math.exp(outcome.held_out_loss), rel=1e-3)
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
    assert log(parts.out) == log(settings.out)


ONE_AFTER_ANOTHER = """
import os, sys
from anabranch.cli import main

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every run meets at a port of its own
for method, port in zip(("smora", "triadapt", "adalora"), sys.argv[1:4]):
    os.environ["MASTER_PORT"] = port
    assert main([*sys.argv[4:], "--method", method, "--out", method]) == 0
"""


def test_two_processes_do_what_one_does_with_twice_the_passes(settings, tmp_path):
    """All methods in one pair of processes, for to start those takes longer than to tune."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(4)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        first, *ports = (str(one.getsockname()[1]) for one in free)
    (tmp_path / "all.py").write_text(ONE_AFTER_ANOTHER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={first}", "all.py", *ports,
        "tune", str(settings.model), "--data", str(settings.held_out), "--rank", "4", "--context", "32", "--batch", "2",
        "--steps", "6", "--lr", "1e-3", "--growth-every", "2", "--orthogonality", "0.1", "--no-progress", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    together = replace(settings, steps=6, lr=1e-3, accumulate=2, held_out=None, orthogonality=0.1)
    for method, line in zip(("smora", "triadapt", "adalora"), done.stdout.splitlines(), strict=True):
        said, one = json.loads(line), tune(replace(together, method=method, out=tmp_path / f"{method} alone"))
        assert said["ranks"] == one.ranks, method
        assert said["train_loss"] == pytest.approx(one.train_loss, abs=2e-5)
        ours, theirs = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in (f"{method} alone", method)
        )
        for name, x in ours.items():
            # Sums in another order: AdamW divides small gradients by their size, so a step may differ by a share of lr.
            torch.testing.assert_close(theirs[name], x, rtol=1e-3, atol=1e-4)


def test_the_log_holds_every_growth(settings):
    """Ranks only change at the steps that have a row of them, and end as the outcome says."""
    outcome = tune(replace(settings, method="triadapt", rank=2, steps=13, growth_every=3, evaluate_every=5))
    ranks = {row["step"]: row["layer_ranks"] for row in log(settings.out) if "layer_ranks" in row}
    grown = [step for step, before in zip([*ranks][1:], ranks.values(), strict=False) if ranks[step] != before]
    assert {4, 7} <= set(ranks)  # from the end of the warm-up on, every three steps
    assert all((step - 1) % 3 == 0 for step in grown)
    assert ranks[13] == outcome.ranks
    totals = {row["step"]: row["ranks"] for row in log(settings.out)}
    assert all(sum(ranks[step].values()) == totals[step] for step in ranks)


def test_the_log_holds_how_often_blocks_were_picked(settings):
    """Each token of a batch picks `chosen` blocks of each layer, padding none."""
    tune(replace(settings, method="smora", chosen=2, evaluate_every=4, targets=("q_proj", "down_proj")))
    rows = log(settings.out)
    assert [row["step"] for row in rows] == [4, 8, 12]
    tokenizer = tuning.load_tokenizer(settings.model)
    packs = Packs(tuning.read_examples(settings.data, tokenizer), context=32, batch=2, seed=0)
    used = [int(packs.at(step).used.sum()) for step in range(12)]
    assert sum(used) < 12 * 2 * 32
    for row in rows:
        assert set(row["usage"]) == {
            f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.q_proj", "mlp.down_proj")
        }
        for layer in row["usage"].values():
            assert sum(layer["counts"]) == 2 * sum(used[row["step"] - 4 : row["step"]])
        assert row["cv"] == pytest.approx(sum(x["cv"] for x in row["usage"].values()) / 4, abs=1e-4)


@pytest.mark.parametrize("method", ["smora", "adalora"])
def test_activations_computed_again_change_no_bit(settings, method):
    settings = replace(settings, method=method, steps=5)
    tune(settings)
    again = replace(settings, out=settings.out.with_name("again"), checkpoint_activations=True)
    tune(again)
    assert log(again.out) == log(settings.out)
    one, other = (load_file(run.out / "adapter_model.safetensors") for run in (settings, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pictures_are_drawn_at_checkpoints(settings, monkeypatch):
    monkeypatch.setattr(tuning._Run, "all_agree", lambda run, stop: run.progress.step == 8)
    assert tune(replace(settings, method="triadapt", plot=True)).interrupted
    assert {path.name for path in settings.out.glob("*.png")} == {"loss.png", "ranks.png"}


@pytest.mark.parametrize("method", ["lora", "triadapt", "adalora"])
def test_a_merged_model_computes_what_was_measured(settings, method, tmp_path):
    outcome = tune(replace(settings, method=method, save_merged=tmp_path / "merged"))
    network = load_model(tmp_path / "merged")
    tokenizer = tuning.load_tokenizer(tmp_path / "merged")
    packs = Packs(tuning.read_examples(settings.data, tokenizer), context=32, batch=2, seed=0)
    # W + dW is rounded to float32 before the product instead of behind it.
    assert mean_loss(network, packs) == pytest.approx(outcome.held_out_loss, abs=1e-4)
    assert abs(mean_loss(load_model(settings.model), packs) - outcome.held_out_loss) > 0.1


@pytest.mark.parametrize("method", ["lora", "smora", "triadapt", "adalora"])
def test_a_run_may_begin_where_another_ended(settings, method):
    first = replace(settings, method=method)
    ended = tune(first).held_out_loss
    second = replace(first, out=settings.out.with_name("second"), init_from=first.out, lr=1e-9, balance=0.0)
    if method != "adalora":  # which masks anew, from sensitivities it has not observed yet
        assert tune(second).held_out_loss == pytest.approx(ended, abs=1e-4)
    for change, message in (
        ({"rank": 2}, "holds other adapters than this run would train; .* is 2, the folder has 4"),
        ({"targets": ("q_proj",)}, "adapts other layers than the targets name: 12 differ"),
        ({"alpha": 3.0}, "alpha is 3.0, the folder has 16.0"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(replace(second, out=settings.out.with_name("third"), **change))


def test_a_file_named_twice_counts_twice(settings):
    once, twice = (tune(replace(settings, steps=1, data=settings.data * n, out=settings.out / str(n))) for n in (1, 2))
    assert (once.examples, twice.examples) == (16, 32)


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
        ({"method": "smora", "save_merged": Path("merged")}, "adapters of smora depend on each token"),
        ({"save_merged": Path(__file__).parent}, "save_merged needs a new or empty folder"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)
