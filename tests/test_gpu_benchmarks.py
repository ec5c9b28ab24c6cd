"""The GPU benchmarks walk through all parts on a CPU, so that a slip costs no time on the machine that has a GPU."""

import json
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are not interpreted")


@pytest.fixture
def run(root, monkeypatch):
    """benchmarks/gpu/run.py as a module, its neighbours importable as they are for the script."""
    monkeypatch.syspath_prepend(str(root / "benchmarks" / "gpu"))
    yield import_module("run")
    for name in ("run", "cases", "adapters", "tuning"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("part", "ours", "peer", "refuses"),
    [
        ("decode", {"anabranch", "anabranch, int8 cache", "anabranch, GQA twin"}, "flash SDPA, expanded K", "cuDNN"),
        ("prefill", {"anabranch, paged", "anabranch, dense"}, "flash SDPA, K expanded before", "cuDNN"),
        ("train", {"anabranch"}, "flash SDPA, expansion in the clock", "cuDNN"),
        ("coordinate-rules", {"anabranch"}, "torch sort", "ByzFL"),
    ],
)
def test_contenders_agree_and_refusals_are_named(run, part, ours, peer, refuses, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "byzfl", None)
    assert run.run_part(part, tmp_path, dry=True) == 0
    table = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert {*ours, peer} <= {sample["contender"] for sample in table["samples"]}
    assert any(refuses in refusal for refusal in table["absent"])  # no back-end of a CPU, or hidden
    assert "| anabranch" in (tmp_path / f"gpu-{part}.md").read_text()


def test_products_over_a_field_agree_to_the_last_bit(run, tmp_path):
    assert run.run_part("field", tmp_path, dry=True) == 0
    table = json.loads((tmp_path / "gpu-field.json").read_text())
    assert {sample["contender"] for sample in table["samples"]} == {
        "anabranch", "torch, int64 and %", "torch, float64 in halves"
    }  # fmt: skip
    assert not table["absent"]


def test_medians_agree_with_their_peers(run, tmp_path):
    assert run.run_part("median", tmp_path, dry=True) == 0
    table = json.loads((tmp_path / "gpu-median.json").read_text())
    assert {sample["case"].split()[0] for sample in table["samples"]} == {"gram", "combine", "median"}
    assert {"anabranch", "torch 10 steps", "torch float32"} <= {sample["contender"] for sample in table["samples"]}


@pytest.mark.parametrize(
    ("part", "peers"),
    [
        ("adapters", {"torch, dense and mask", "torch, gathered", "torch, loop over adapters"}),
        ("adapters-train", {"torch, dense and mask", "torch, LoRA of all ranks without routing"}),
    ],
)
def test_adapters_agree_with_torch(run, part, peers, tmp_path):
    assert run.run_part(part, tmp_path, dry=True) == 0
    table = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert {"anabranch"} | peers <= {sample["contender"] for sample in table["samples"]}
    assert table["absent"] == []


def test_roofs_are_positive(run, tmp_path):
    assert run.run_part("roof", tmp_path, dry=True) == 0
    table = json.loads((tmp_path / "gpu-roof.json").read_text())
    assert min(table[name] for name in ("read_bytes_per_s", "copy_bytes_per_s", "bf16_flops")) > 0


@pytest.mark.parametrize("part", ["tune-decode", "tune-prefill", "tune-gram"])
def test_other_tiles_than_the_shipped_ones_run(run, part, tmp_path):
    assert run.run_part(part, tmp_path, dry=True) == 0
    table = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert len(table) >= 2
    assert all(row["seconds"] > 0 for row in table)


def test_without_a_gpu_nothing_is_measured(run, tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        run.run_part("decode", tmp_path, dry=False)
