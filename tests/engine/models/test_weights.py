"""Checkpoint folders: what is loaded, what is written, what is refused and how it is said."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model

SIGMA = ModelConfig(
    family="sigma", vocab_size=61, hidden_size=48, ffn_size=80, layers=2, q_heads=12, k_heads=2, v_heads=6, k_dim=4,
    v_dim=8, max_position=64, q_intermediate_size=40, qkv_bias=True, o_bias=True,
)  # fmt: skip
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(len(tokens)), DenseAttend(1)))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def sigma(fill: Callable[..., None], tmp_path: Path) -> tuple[Path, Transformer]:
    """A saved DiffQKV model."""
    model = Transformer(SIGMA)
    fill(model)
    save_model(model, tmp_path / "sigma")
    return tmp_path / "sigma", model


def test_a_sharded_checkpoint_is_the_same_model(make_checkpoint: Callable[..., Any], tokens: Tensor) -> None:
    folder, peer = make_checkpoint("qwen2", shard="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    with torch.no_grad():
        expected = peer(tokens[None]).logits[0]
    torch.testing.assert_close(logits(load_model(folder), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_what_is_saved(
    family: str, tied: bool, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    folder, peer = make_checkpoint(family, tie_word_embeddings=tied)
    save_model(load_model(folder), tmp_path / "saved")
    saved, expected = load_file(tmp_path / "saved" / "model.safetensors"), peer.state_dict()
    assert (HEAD in saved) is not tied
    assert saved.keys() == expected.keys() - ({HEAD} if tied else set())
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    again = type(peer).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit(dtype: torch.dtype, fill: Callable[..., None], tmp_path: Path) -> None:
    model = Transformer(SIGMA, dtype=dtype)
    fill(model)
    save_model(model, tmp_path / "deep" / "folder")
    again = load_model(tmp_path / "deep" / "folder")
    assert again.config == SIGMA
    assert again.embed.dtype == dtype
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert json.loads((tmp_path / "deep" / "folder" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_the_dtype_can_be_chosen(sigma: tuple[Path, Transformer]) -> None:
    folder, model = sigma
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.blocks[0].qkv.weight, model.blocks[0].qkv.weight.bfloat16())
    with pytest.raises(ValueError, match=r"dtype must be one of \['torch.float32', .*, got torch.int8"):
        load_model(folder, dtype=torch.int8)


def test_float64_is_converted_only_on_request(fill: Callable[..., None], tmp_path: Path) -> None:
    model = Transformer(SIGMA, dtype=torch.float64)
    fill(model)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        load_model(tmp_path)
    assert torch.equal(load_model(tmp_path, dtype=torch.float32).embed, model.embed.float())


def test_saving_replaces_a_model_and_leaves_nothing_else_behind(sigma: tuple[Path, Transformer]) -> None:
    folder, model = sigma
    with torch.no_grad():
        model.embed.add_(1)
    save_model(model, folder)
    assert torch.equal(load_model(folder).embed, model.embed)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_derived_frequencies_of_old_checkpoints_are_passed_over(sigma: tuple[Path, Transformer]) -> None:
    folder, model = sigma
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert torch.equal(load_model(folder).embed, model.embed)


def test_a_tied_model_may_carry_its_head_again_but_not_another(
    make_checkpoint: Callable[..., Any], tokens: Tensor
) -> None:
    folder, _ = make_checkpoint("llama", tie_word_embeddings=True)
    expected = logits(load_model(folder), tokens)
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert torch.equal(logits(load_model(folder), tokens), expected)
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED] + 1}))
    with pytest.raises(ValueError, match=r"ties the embeddings, but lm_head.weight differs from model.embed_tokens"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(sigma: tuple[Path, Transformer]) -> None:
    folder, _ = sigma

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.sinks"] = torch.ones(12)
        tensors[K_PROJ] = tensors[K_PROJ][:4].clone()
        del tensors["model.norm.weight"]

    edit(folder, spoil)
    with pytest.raises(ValueError, match=r"does not fit its config.json \(sigma\)") as error:
        load_model(folder)
    assert "1 tensors missing: model.norm.weight" in str(error.value)
    assert "1 tensors unexpected: model.layers.0.self_attn.sinks" in str(error.value)
    assert f"1 tensors misshapen: {K_PROJ} [4, 48] instead of [8, 48]" in str(error.value)


def test_a_long_list_of_names_is_cut(sigma: tuple[Path, Transformer]) -> None:
    folder, model = sigma
    (folder / "config.json").write_text(json.dumps(replace(model.config, layers=3, windows=()).to_json()))
    with pytest.raises(ValueError, match=r"16 tensors missing: model\.layers\.2\.input_layernorm") as error:
        load_model(folder)
    assert str(error.value).count("model.layers.2") == 6
    assert str(error.value).endswith(", …")


def test_an_untied_model_needs_its_head(sigma: tuple[Path, Transformer]) -> None:
    folder, _ = sigma
    edit(folder, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ValueError, match=r"1 tensors missing: lm_head.weight$"):
        load_model(folder)


def test_quantised_tensors_are_not_taken_for_weights(sigma: tuple[Path, Transformer]) -> None:
    folder, _ = sigma
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"stored in none of \['BF16', .*: model.layers.1.self_attn.k_proj.w.* \(F8"):
        load_model(folder)


# Memory of this process that is no page of a file: before loading, at its highest after a tensor was read, in the end.
LOAD_AND_LOOK = """
import re, sys
from pathlib import Path
from anabranch.common.checkpoint import Checkpoint
from anabranch.models.weights import load_model

def own_memory():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

read = Checkpoint.read
Checkpoint.read = lambda self, name: (read(self, name), seen.append(own_memory()))[0]
seen = [own_memory()]
loaded = load_model(sys.argv[1])
assert len(seen) > 20 and bool((loaded.blocks[2].down.weight == 1).all())
print(seen[0], max(seen), own_memory())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
def test_loading_never_holds_a_second_copy(tmp_path: Path) -> None:
    model = Transformer(replace(SIGMA, hidden_size=384, ffn_size=4096, layers=3, windows=()))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 50e6
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    save_model(model, tmp_path)
    del model

    # A process of its own: here the allocator may have kept what earlier tests freed.
    said = subprocess.run(
        [sys.executable, "-c", LOAD_AND_LOOK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, highest, after = map(int, said.stdout.split())
    assert 0.9 * weights < after - before  # small tensors lie where the imports left room
    assert highest - before < 1.2 * weights
