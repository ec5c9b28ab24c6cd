"""Adapters on disk: PEFT reads ours and we read PEFT's; every kind comes back as it was."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings
from anabranch.adapters.attach import Adapted, attach, linear_layers
from anabranch.adapters.files import MOST_CONFIG_BYTES, load_adapters, read_adapters, save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import TriAdapt, TriAdaptSettings
from anabranch.models.transformer import DenseAttend
from anabranch.models.weights import load_model
from anabranch_kernels.rank_lora.op import rank_lora, table_of

TOKENS = torch.arange(12).view(2, 6)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


def randomise(adapted):
    with torch.no_grad():
        for adapter in adapted.values():
            adapter.b.normal_(std=0.1)


def prune(adapted):
    """Ranks 6, 4, 5 and 0 remain."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, adapter in enumerate(adapted.values()):
            adapter.e.normal_(generator=random)
            adapter.alive[[[], [1, 4], [0], range(6)][index]] = False
            adapter.mask()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_adapters_are_computed_as_by_peft(tmp_path, rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora, init_lora_weights=False,
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = llama()
    assert len(load_adapters(ours, tmp_path)) == 4
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-6


def test_peft_computes_ours(tmp_path):
    ours = llama()
    settings = RankLoraSettings(ranks=4, alpha=6.0)
    adapted = attach(ours, lambda name, i, o: RankLora(i, o, settings), targets=["q_proj", "v_proj"])
    randomise(adapted)
    save_adapters(tmp_path, adapted, base_model="somebody/llama")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-6


def test_pefts_adalora_is_computed_as_by_peft_and_peft_computes_ours(tmp_path):
    """There and back: PEFT's folder, loaded and saved here, is PEFT's again, masked ranks and all."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    model = theirs.base_model.model
    theirs.save_pretrained(tmp_path / "whole")
    names = [name.removesuffix(".lora_E") for name, module in model.named_modules() if name.endswith(".lora_E")]
    pattern = {}
    for index, name in enumerate(names):
        mask = torch.arange(6) % (index + 2) != 0
        model.get_submodule(name).lora_E["default"].data[~mask] = 0.0
        pattern[f"{name}.lora_E.default"] = mask.tolist()
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "pruned")
    for folder in ("whole", "pruned"):
        reloaded = peft.PeftModel.from_pretrained(llama(), tmp_path / folder).eval()
        ours = llama()
        adapted = load_adapters(ours, tmp_path / folder)
        assert [one.rank for one in adapted.values()] == ([6] * 4 if folder == "whole" else [3, 4, 4, 4])
        assert (logits(ours) - logits(reloaded)).abs().max() < 1e-6
        save_adapters(tmp_path / "again", adapted)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
        assert (logits(ours) - logits(again)).abs().max() < 1e-6
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-6


KINDS = {
    "lora": (RankLora, RankLoraSettings(ranks=4)),
    "smora": (RankLora, RankLoraSettings(ranks=8, chosen=2, balance=0.5)),
    "experts": (RankLora, RankLoraSettings(ranks=8, block=4, chosen=1, gate="softmax_topk")),
    "triadapt": (TriAdapt, TriAdaptSettings(steps=10, reference=4)),
    "adalora": (AdaLora, AdaLoraSettings(steps=10, initial=6, target=4, interval=3, orthogonality=0.25)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(tmp_path, kind):
    make, settings = KINDS[kind]
    ours = llama()
    adapted = attach(ours, lambda name, i, o: make(i, o, settings), targets=["q_proj", "up_proj"])
    if kind == "triadapt":
        adapted["model.layers.1.mlp.up_proj"].grow(5)
    elif kind == "adalora":
        prune(adapted)
    else:
        next(iter(adapted.values())).bias.add_(0.1)
    randomise(adapted)
    save_adapters(tmp_path, adapted)
    again = llama()
    loaded = load_adapters(again, tmp_path)
    assert list(loaded) == list(adapted)
    assert torch.equal(logits(again), logits(ours))
    assert all(adapter.settings == settings for adapter in loaded.values())


def test_weights_take_the_dtype_of_their_layer(tmp_path):
    ours = llama()
    settings = RankLoraSettings(ranks=4)
    adapted = attach(ours, lambda name, i, o: RankLora(i, o, settings), targets=["q_proj"])
    randomise(adapted)
    save_adapters(tmp_path, adapted)
    half = llama().bfloat16()
    load_adapters(half, tmp_path)
    # bfloat16 keeps 8 bits: logits of size one differ by a few 2^-9 after two layers.
    assert_close(logits(half).float(), logits(ours), rtol=0.05, atol=0.05)


def break_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_a_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")


def other_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.head.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: break_config(f, use_dora=True), "use_dora"),
        (lambda f: break_config(f, bias="all"), "bias"),
        (lambda f: break_config(f, peft_type="IA3"), "peft_type must be LORA, ADALORA, RANK_LORA, TRIADAPT, got 'ia3'"),
        (drop_a_tensor, "has only B of A, B"),
        (other_tensor, "is none of A, B"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    ],
)
def test_folders_that_cannot_be_are_refused_and_the_model_is_left_alone(tmp_path, spoil, message):
    ours = llama()
    settings = RankLoraSettings(ranks=4)
    save_adapters(tmp_path, attach(ours, lambda name, i, o: RankLora(i, o, settings), targets=["q_proj"]))
    spoil(tmp_path)
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank_pattern": {"model.layers.0.mlp.up_proj.lora_E": [True] * 5}},
            "rank_pattern is of 5 ranks, init_r is 6",
        ),
        ({"rank_pattern": None}, "needs tensors .*'a': .6, 16.*the file has .*'a': .4, 16."),
        ({"total_step": None}, "has no total_step"),
    ],
)
def test_an_adalora_whose_pattern_does_not_fit_is_refused(tmp_path, changes, message):
    ours = llama()
    adapted = attach(ours, lambda name, i, o: AdaLora(i, o, KINDS["adalora"][1]), targets=["q_proj", "up_proj"])
    prune(adapted)
    save_adapters(tmp_path, adapted)
    break_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapters(llama(), tmp_path)


def test_our_own_model_computes_pefts_adapters_as_peft_does(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    assert len(load_adapters(ours, tmp_path / "adapter")) == 14
    with torch.no_grad():
        rows = ours.logits(ours(TOKENS.flatten(), torch.arange(6).repeat(2), DenseAttend(2)))
    assert_close(rows, logits(theirs).flatten(0, 1), rtol=1e-5, atol=1e-5)
    save_adapters(tmp_path / "again", load_adapters(load_model(tmp_path / "model"), tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert (logits(again) - logits(theirs)).abs().max() < 1e-6


def saved(folder, kind):
    make, settings = KINDS[kind]
    adapted = attach(llama(), lambda name, i, o: make(i, o, settings), targets=["q_proj", "up_proj"])
    randomise(adapted)
    save_adapters(folder, adapted)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_reading_attaches_nothing_and_packs_what_each_layer_computes(tmp_path, kind):
    adapted, model = saved(tmp_path, kind), llama()
    before = logits(model)
    found = read_adapters(linear_layers(model), tmp_path)
    assert list(found) == list(adapted)
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    x = torch.randn(5, 16)
    for name, adapter in found.items():
        place, *tensors = adapter.packed()
        with torch.no_grad():
            y = rank_lora(x, *tensors, table_of([place]), torch.zeros(5, dtype=torch.int32)).y
            assert torch.equal(y, adapted[name](x))
        assert {key: list(x.shape) for key, x in adapter.state_dict().items()} == type(adapter).shapes(
            16, len(y.T), adapter.settings
        )


def rewrite(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("triadapt", lambda f: rewrite(f, **{f"{UP}.lower": torch.zeros(3, 3)}), "needs tensors .*'lower': .16, 16."),
        ("smora", lambda f: rewrite(f, **{f"{UP}.router": torch.zeros(8, 15)}), "'router': .8, 15."),
        ("smora", lambda f: rewrite(f, **{f"{UP}.more": torch.zeros(1)}), "the file has .*'more': .1."),
        ("smora", lambda f: rewrite(f, other=torch.zeros(1)), "tensor other belongs to none"),
        ("lora", lambda f: rewrite(f, **{f"base_model.model.{UP}.lora_A.weight": torch.zeros(4)}), "is none of A, B"),
        ("smora", lambda f: break_config(f, settings={"ranks": 8, "what": 1}), "lacks what rank_lora needs"),
        ("smora", lambda f: break_config(f, settings={"ranks": 10**9, "chosen": 2}), "needs tensors"),
        ("smora", lambda f: break_config(f, target_modules=3), "lacks what rank_lora needs"),
        ("lora", lambda f: break_config(f, lora_alpha=None), "lacks what lora needs"),
        ("lora", lambda f: break_config(f, more="x" * MOST_CONFIG_BYTES), "adapter_config.json has 10..... bytes, all"),
        ("lora", lambda f: rewrite(f, **{f"base_model.model.x.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}),
         "adapts .'x'.; the model has"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_told_before_it_is_read(tmp_path, kind, spoil, message):
    saved(tmp_path, kind)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_adapters(linear_layers(llama()), tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    saved(tmp_path, "lora")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert len(read_adapters(linear_layers(llama()), tmp_path, most_bytes=size)) == 4
    with pytest.raises(ValueError, match=f"has {size} bytes, allowed {size - 1}"):
        read_adapters(linear_layers(llama()), tmp_path, most_bytes=size - 1)
