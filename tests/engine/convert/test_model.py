"""Converted models: bit for bit the same where nothing is merged, the same to rounding where nothing is lost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anabranch.convert.merge import Statistics, to_complex, to_rows
from anabranch.convert.model import METHODS, convert_model, measure, weight_statistics
from anabranch.convert.settings import METHODS as NAMES
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES = {
    "llama": ("llama", {}),
    "llama, one K head per query head": ("llama", {"num_key_value_heads": 8}),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, window in the second layer": ("qwen2", WINDOWS),
}
# Logits are of order one to ten; the bound leaves float32 about ten roundings a layer, as in the tests of the models.
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(258, (48,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens, torch.arange(len(tokens)), DenseAttend(1)))


@torch.no_grad()
def make_copies(model: Transformer, heads: int) -> None:
    """Make the K heads of each group copies of its first, each by a complex factor per frequency; biases too."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    for block in model.blocks:
        parts = [block.qkv.weight] if block.qkv.bias is None else [block.qkv.weight, block.qkv.bias[:, None]]
        rows = torch.cat(parts, 1)[config.q_width : config.q_width + config.k_width]
        keys = to_complex(rows, config.k_heads)
        m = len(keys) // heads
        factors = torch.randn(keys.shape[:2], dtype=torch.complex128, generator=generator)
        keys = factors[..., None] * keys[::m].repeat_interleave(m, 0)
        made = to_rows(keys).to(rows.dtype)
        block.qkv.weight[config.q_width : config.q_width + config.k_width] = made[:, : config.hidden_size]
        if block.qkv.bias is not None:
            block.qkv.bias[config.q_width : config.q_width + config.k_width] = made[:, -1]


def windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.view(2, -1)[:, :-1], tokens.view(2, -1)[:, 1:]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_as_many_heads_give_every_bit_of_the_logits(case: str, method: str, make_checkpoint, tokens, tmp_path):
    family, changes = CASES[case]
    model = load_model(make_checkpoint(family, **changes))
    converted = convert_model(model, model.config.k_heads, method=method)
    assert converted.errors == (0.0, 0.0)
    save_model(converted.model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.config.family == "sigma"
    assert again.config.windows == model.config.windows
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [1, 2])
def test_copies_are_merged_without_a_trace(heads: int, case: str, calibrated: bool, make_checkpoint, tokens):
    """The factors are folded exactly, for every family, position and head; plain averaging is far off."""
    family, changes = CASES[case]
    model = load_model(make_checkpoint(family, **changes))
    make_copies(model, heads)
    expected = logits(model, tokens)
    statistics = measure(model, *windows(tokens)) if calibrated else None
    converted = convert_model(model, heads, statistics=statistics)
    assert converted.model.config.k_heads == heads
    assert max(converted.errors) < 1e-12
    torch.testing.assert_close(logits(converted.model, tokens), expected, **CLOSE)
    mean = convert_model(model, heads, method="mean")
    assert (logits(mean.model, tokens) - expected).abs().max() > 0.1


def test_only_queries_and_keys_change(make_checkpoint):
    model = load_model(make_checkpoint("qwen2"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = convert_model(model, 2)
    for name, tensor in converted.model.state_dict().items():
        if "qkv" in name:
            assert torch.equal(tensor[-model.config.v_width :], before[name][-model.config.v_width :])
            assert tensor.shape[0] == before[name].shape[0] - 2 * model.config.k_dim
        else:
            assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(0 < error < 1 for error in converted.errors)


def test_the_mean_leaves_queries_alone(make_checkpoint):
    model = load_model(make_checkpoint("llama"))
    c = model.config
    converted = convert_model(model, 1, method="mean").model
    for old, new in zip(model.blocks, converted.blocks, strict=True):
        q, k, _ = old.qkv.weight.split([c.q_width, c.k_width, c.v_width])
        assert torch.equal(new.qkv.weight[: c.q_width], q)
        mean = k.view(c.k_heads, c.k_dim, -1).mean(0)
        torch.testing.assert_close(new.qkv.weight[c.q_width : c.q_width + c.k_dim], mean)


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_statistics_are_those_of_the_projections(case: str, make_checkpoint, tokens):
    """Against the projections' outputs before RoPE, which must cancel out; places without a target do not count."""
    model = load_model(make_checkpoint(case))
    inputs, targets = windows(tokens)
    targets = targets.clone()
    targets[1, 10:] = -100
    seen: list[Tensor] = []
    hooks = [block.qkv.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(inputs.flatten(), torch.arange(inputs.shape[1]).repeat(2), DenseAttend(2))
    for hook in hooks:
        hook.remove()
    for got, out in zip(measure(model, inputs, targets, batch=1), seen, strict=True):
        rows = out[: inputs.shape[1] + 10].T
        q, k = to_complex(rows[:48], 8), to_complex(rows[48:72], 4)
        wanted = Statistics.of(q, k)
        scale = wanted.gram.abs().max().item()
        torch.testing.assert_close(got.gram, wanted.gram, atol=1e-5 * scale, rtol=0)  # float32 outputs, turned
        torch.testing.assert_close(got.energy, wanted.energy, atol=0, rtol=1e-5)


@torch.no_grad()
def test_the_weights_alone_stand_for_normed_states_without_correlation(make_checkpoint):
    """The same as over states of mean zero and covariance one, scaled by the norm's weight: each axis, both ways."""
    block = load_model(make_checkpoint("qwen2")).blocks[0]
    axes = 48**0.5 * torch.eye(48)
    states = torch.cat([axes, -axes]) * block.attention_norm
    rows = (states @ block.qkv.weight.T + block.qkv.bias).T
    sampled = Statistics.of(to_complex(rows[:48], 8), to_complex(rows[48:72], 4))
    got = weight_statistics(block)
    scale = got.gram.abs().max().item()
    torch.testing.assert_close(sampled.gram / 96, got.gram, atol=1e-5 * scale, rtol=0)  # float32 outputs
    torch.testing.assert_close(sampled.energy / 96, got.energy, atol=0, rtol=1e-5)


def test_calibration_lowers_what_is_lost_on_its_text(make_checkpoint, tokens):
    model = load_model(make_checkpoint("qwen2"))
    statistics = measure(model, *windows(tokens))
    calibrated = convert_model(model, 2, statistics=statistics)
    mean = convert_model(model, 2, statistics=statistics, method="mean")
    assert all(a < b for a, b in zip(calibrated.errors, mean.errors, strict=True))


def test_a_merged_model_can_be_merged_again(make_checkpoint, tokens):
    model = load_model(make_checkpoint("llama"))
    make_copies(model, 1)
    twice = convert_model(convert_model(model, 2).model, 1).model
    torch.testing.assert_close(logits(twice, tokens), logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype, make_checkpoint):
    model = load_model(make_checkpoint("llama"), dtype=dtype)
    converted = convert_model(model, 2).model
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    wide = convert_model(model.float(), 2).model
    for parameter, exact in zip(converted.parameters(), wide.parameters(), strict=True):
        assert torch.equal(parameter, exact.to(dtype))  # computed in float64, rounded once


@pytest.mark.parametrize("heads", [0, 3, 8, -1])
def test_heads_that_do_not_divide_are_refused(heads: int, make_checkpoint):
    model = load_model(make_checkpoint("llama"))
    with pytest.raises(ValueError, match=rf"must divide the model's 4: one of \[1, 2, 4\], got {heads}"):
        convert_model(model, heads)


def test_a_model_that_norms_its_keys_is_refused_with_the_reason(make_checkpoint: Callable[..., Path]):
    model = load_model(make_checkpoint("qwen3", head_dim=6))
    with pytest.raises(ValueError, match="a qwen3 model norms every key after its projection"):
        convert_model(model, 2)


def test_an_augmented_query_is_refused():
    config = ModelConfig(
        family="sigma", vocab_size=9, hidden_size=8, ffn_size=8, layers=1, q_heads=4, k_heads=2, v_heads=4, k_dim=2,
        v_dim=2, max_position=8, q_intermediate_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="augmented query"):
        convert_model(Transformer(config), 1)
    plain = Transformer(replace(config, q_intermediate_size=None)).initialise(torch.Generator().manual_seed(0))
    assert convert_model(plain, 1).model.config.k_heads == 1


def test_methods_are_named(make_checkpoint):
    assert set(METHODS) == set(NAMES)
    with pytest.raises(ValueError, match=r"unknown method 'median'; choose one of \['mean', 'svd'\]"):
        convert_model(load_model(make_checkpoint("llama")), 2, method="median")
