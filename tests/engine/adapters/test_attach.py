"""Adapters beside a model's layers: which layers, what trains, and how they come off again."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from anabranch.adapters.attach import Adapted, attach, detach, merge, padded
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(6, 6), "up": nn.Linear(6, 6)}) for _ in range(2))
        self.lm_head = nn.Linear(6, 9)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["up"](block["q_proj"](x).tanh())
        return self.lm_head(x)


def lora(**settings):
    made = RankLoraSettings(ranks=4, **settings)
    return lambda name, inputs, outputs: RankLora(inputs, outputs, made)


def randomise(adapted):
    with torch.no_grad():
        for adapter in adapted.values():
            adapter.b.normal_()


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["*"], ["blocks.0.q_proj", "blocks.0.up", "blocks.1.q_proj", "blocks.1.up"]),
        (["q_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["blocks.1.*", "lm_head"], ["blocks.1.q_proj", "blocks.1.up", "lm_head"]),
    ],
)
def test_targets_are_names_ends_and_patterns(targets, names):
    assert list(attach(Model(), lora(), targets=targets)) == names


def test_only_adapters_train_and_the_output_is_unchanged_at_first():
    model, x = Model(), torch.randn(3, 6)
    before = model(x)
    attach(model, lora(chosen=2))
    assert torch.equal(model(x), before)
    assert all((".adapters." in name) == p.requires_grad for name, p in model.named_parameters())


def test_merging_gives_the_adapted_output_and_the_old_layers():
    model, x = Model(), torch.randn(3, 6)
    adapted = attach(model, lora())
    randomise(adapted)
    with_adapters = model(x)
    merge(model)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert_close(model(x), with_adapters)


def test_a_merge_that_cannot_be_changes_nothing():
    model, x = Model(), torch.randn(3, 6)
    randomise(attach(model, lora(chosen=2)))
    before = model(x)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(model)
    assert torch.equal(model(x), before)


def test_detached_the_model_is_as_before():
    model, x = Model(), torch.randn(3, 6)
    before = model(x)
    randomise(attach(model, lora()))
    detach(model)
    assert torch.equal(model(x), before)


def test_padding_takes_no_part():
    model, x = Model(), torch.randn(2, 3, 6)
    bare = model(x)
    adapted = attach(model, lora(chosen=2))
    randomise(adapted)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with padded(model, mask):
        out = model(x)
    assert torch.equal(out[~mask], bare[~mask])
    assert not torch.isclose(out[mask], bare[mask]).all(-1).any()
    assert all(adapter.counts.sum() == 3 * 2 for adapter in adapted.values())
    assert not torch.equal(model(x)[~mask], bare[~mask])


def test_what_matches_nothing_is_refused_and_nothing_changes():
    model = Model()
    with pytest.raises(ValueError, match=r"no linear layer matches \['v_proj'\]"):
        attach(model, lora(), targets=["q_proj", "v_proj"])
    assert all(p.requires_grad for p in model.parameters())
    attach(model, lora())
    with pytest.raises(ValueError, match="has adapters already"):
        attach(model, lora())


def fused():
    config = ModelConfig(
        family="sigma", vocab_size=32, hidden_size=16, ffn_size=24, layers=2, q_heads=4, k_heads=1, v_heads=2, k_dim=4,
        v_dim=4, max_position=64,
    )  # fmt: skip
    return Transformer(config).initialise(torch.Generator().manual_seed(0), std=0.3).eval()


def hidden(model):
    tokens = torch.arange(6)
    with torch.no_grad():
        return model(tokens, tokens, DenseAttend(1))


def test_fused_layers_have_adapters_of_their_own():
    """q, k and v are one matrix here; each takes an adapter under the name that checkpoints give it."""
    model = fused()
    before = hidden(model)
    adapted = attach(model, lora(), targets=["q_proj", "v_proj", "model.layers.1.mlp.*"])
    assert [name for name in adapted if ".1." in name] == [
        f"model.layers.1.{name}" for name in
        ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]  # fmt: skip
    assert adapted["model.layers.0.self_attn.v_proj"].b.shape == (4, 8)
    assert torch.equal(hidden(model), before)
    randomise(adapted)
    with_adapters = hidden(model)
    assert (with_adapters - before).abs().max() > 0.01
    merge(model)
    assert_close(hidden(model), with_adapters)
