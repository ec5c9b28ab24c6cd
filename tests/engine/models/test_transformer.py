"""Models against transformers, against a second implementation of DiffQKV, and against themselves in pieces."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model

# Logits are of order one to ten here; the bound is absolute and leaves float32 about ten roundings a layer.
CLOSE = {"atol": 1e-4, "rtol": 0.0}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one K head per query head": ("llama", {"num_key_value_heads": 6}),
    "llama, grouped heads": ("llama", {}),
    "llama, one K head": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 20}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn positions": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, windows from the second layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, windows by layer_types": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3, biases, tied": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}
SIGMA = ModelConfig(
    family="sigma", vocab_size=61, hidden_size=48, ffn_size=80, layers=3, q_heads=12, k_heads=2, v_heads=6, k_dim=8,
    v_dim=8, max_position=64, q_intermediate_size=40,
)  # fmt: skip
SIGMAS = {
    "fewer K heads": SIGMA,
    "fewer V heads": replace(SIGMA, k_heads=6, v_heads=2),
    "heads that do not divide": replace(SIGMA, k_heads=4, v_heads=3),
    "narrow keys": replace(SIGMA, k_dim=4, v_dim=12),
    "wide keys, no AugQ": replace(SIGMA, k_dim=16, v_dim=6, q_intermediate_size=None),
    "AugQ with a residual": replace(SIGMA, augq_residual=True),
    "tied, biases": replace(SIGMA, tie_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True),
}


def whole(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of one text, dense and in one piece."""
    return model.logits(model(tokens, torch.arange(len(tokens)), DenseAttend(1)))


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(case: str, make_checkpoint: Callable[..., Any], tokens: Tensor) -> None:
    family, changes = FAMILIES[case]
    folder, peer = make_checkpoint(family, **changes)
    expected = peer(tokens[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(whole(load_model(folder), tokens), expected, **CLOSE)


@pytest.mark.parametrize(
    "case", [case for case in FAMILIES if ("window" in case or "positions" in case) and "no" not in case]
)
@torch.no_grad()
def test_windows_and_scaled_positions_are_felt_in_these_texts(
    case: str, make_checkpoint: Callable[..., Any], tokens: Tensor
) -> None:
    """Otherwise the comparison above would also pass for a model that leaves them out."""
    family, changes = FAMILIES[case]
    model = load_model(make_checkpoint(family, **changes)[0])
    plain = Transformer(replace(model.config, windows=(), rope_scaling=None))
    plain.load_state_dict(model.state_dict())
    assert (whole(plain, tokens) - whole(model, tokens)).abs().max() > 0.1


def sigma_logits(tensors: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """Sigma from the paper's formulas, one head at a time, rotations as complex numbers, from published names."""
    nq, nk, nv = (config[f"num_{kind}_heads"] for kind in ("attention", "key", "value"))
    T, positions = len(tokens), torch.arange(len(tokens))
    hidden = positions[:, None] < positions  # [query, key]: keys that come later

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * tensors[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def gated(x: Tensor, name: str) -> Tensor:
        return project(F.silu(project(x, f"{name}gate_proj")) * project(x, f"{name}up_proj"), f"{name}down_proj")

    def turn(head: Tensor) -> Tensor:
        half = head.shape[-1] // 2
        frequencies = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(head[:, :half], head[:, half:]) * torch.polar(
            torch.ones(T, half, dtype=torch.float64), positions[:, None] * frequencies
        )
        return torch.cat([turned.real, turned.imag], -1)

    x = tensors["model.embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        attn = f"{layer}.self_attn"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (project(h, f"{attn}.{name}_proj") for name in "qkv")
        if config["q_intermediate_size"]:
            mlp = project(
                F.silu(project(q, f"{attn}.q_gate_proj")) * project(q, f"{attn}.q_up_proj"), f"{attn}.q_down_proj"
            )
            q = q + mlp if config["augq_residual"] else mlp
        outputs = []
        for i in range(nq):
            qi = turn(q.chunk(nq, -1)[i])
            ki, vi = turn(k.chunk(nk, -1)[i * nk // nq]), v.chunk(nv, -1)[i * nv // nq]
            scores = (qi @ ki.T / config["k_head_dim"] ** 0.5).masked_fill(hidden, -torch.inf)
            outputs.append(scores.softmax(-1) @ vi)
        x = x + project(torch.cat(outputs, -1), f"{attn}.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        x = x + project(
            F.silu(project(h, f"{layer}.mlp.gate_proj")) * project(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
    x = norm(x, "model.norm")
    return x @ tensors["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def published(model: Transformer, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the model looks like to others: its tensors by Hugging Face name, in float64, and its config.json."""
    save_model(model, folder)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    return tensors, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", SIGMAS)
@torch.no_grad()
def test_sigma_equals_the_formulas(case: str, fill: Callable[..., None], tmp_path: Path, tokens: Tensor) -> None:
    model = Transformer(SIGMAS[case])
    fill(model)
    expected = sigma_logits(*published(model, tmp_path), tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(whole(model, tokens), expected.float(), **CLOSE)


@pytest.mark.parametrize("case", SIGMAS)
def test_sigma_gradients_equal_those_of_the_formulas(
    case: str, fill: Callable[..., None], tmp_path: Path, tokens: Tensor
) -> None:
    model = Transformer(SIGMAS[case], dtype=torch.float64)
    fill(model)
    F.cross_entropy(model.logits(model(tokens, torch.arange(48), DenseAttend(1)))[:-1], tokens[1:]).backward()
    tensors, config = published(model, tmp_path / "weights")
    for tensor in tensors.values():
        tensor.requires_grad_()
    F.cross_entropy(sigma_logits(tensors, config, tokens)[:-1], tokens[1:]).backward()

    gradients = Transformer(model.config, dtype=torch.float64)
    for holder, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        holder.data.copy_(parameter.grad)
    got = published(gradients, tmp_path / "gradients")[0]
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        # The angles are float32 in the model and float64 in the formulas: 48 positions cost about 1e-6.
        torch.testing.assert_close(
            got[name], tensor.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
def test_sigma_with_equal_heads_and_no_augq_is_a_llama(make_checkpoint: Callable[..., Any], tokens: Tensor) -> None:
    folder, _ = make_checkpoint("llama")
    expected = whole(load_model(folder), tokens)
    config = json.loads((folder / "config.json").read_text())
    heads = config.pop("num_key_value_heads")
    config |= {"model_type": "sigma", "num_key_heads": heads, "num_value_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    assert model.config.family == "sigma"
    assert torch.equal(whole(model, tokens), expected)


@torch.no_grad()
def test_augq_with_a_residual_starts_as_the_model_it_was_added_to(fill: Callable[..., None], tokens: Tensor) -> None:
    plain = Transformer(replace(SIGMA, q_intermediate_size=None))
    fill(plain)
    augmented = Transformer(replace(SIGMA, augq_residual=True)).initialise(torch.Generator().manual_seed(0))
    augmented.load_state_dict(plain.state_dict(), strict=False)
    for block in augmented.blocks:
        block.augq_down.weight.zero_()
    assert torch.equal(whole(augmented, tokens), whole(plain, tokens))


PIECES = [
    ("in one piece", [48]),
    ("in chunks of one page", [4] * 12),
    ("in uneven chunks", [7, 1, 13, 2, 25]),
    ("prompt, then token by token", [20] + [1] * 28),
]


@pytest.mark.parametrize(("how", "pieces"), PIECES, ids=[how for how, _ in PIECES])
@pytest.mark.parametrize("case", ["llama, grouped heads", "mistral, window", "qwen2", "qwen3, windows by layer_types"])
@torch.no_grad()
def test_a_paged_cache_gives_the_dense_logits(
    case: str, how: str, pieces: list[int], make_checkpoint: Callable[..., Any], paged_attend: Any, tokens: Tensor
) -> None:
    family, changes = FAMILIES[case]
    model = load_model(make_checkpoint(family, **changes)[0])
    torch.testing.assert_close(in_pieces(model, tokens, pieces, paged_attend), whole(model, tokens), **CLOSE)


@pytest.mark.parametrize(("how", "pieces"), PIECES, ids=[how for how, _ in PIECES])
@pytest.mark.parametrize("case", SIGMAS)
@torch.no_grad()
def test_a_paged_cache_gives_the_dense_logits_of_sigma(
    case: str, how: str, pieces: list[int], fill: Callable[..., None], paged_attend: Any, tokens: Tensor
) -> None:
    model = Transformer(SIGMAS[case])
    fill(model)
    torch.testing.assert_close(in_pieces(model, tokens, pieces, paged_attend), whole(model, tokens), **CLOSE)


def in_pieces(model: Transformer, tokens: Tensor, pieces: list[int], paged_attend: Any) -> Tensor:
    attend = paged_attend(model.config)
    hidden = [model(piece, attend.grow(len(piece)), attend) for piece in tokens.split(pieces)]
    return model.logits(torch.cat(hidden))


@torch.no_grad()
def test_sequences_of_a_dense_batch_do_not_see_each_other(fill: Callable[..., None], tokens: Tensor) -> None:
    model = Transformer(SIGMA)
    fill(model)
    batch = model.logits(model(tokens, torch.arange(16).repeat(3), DenseAttend(3)))
    alone = torch.cat([whole(model, text) for text in tokens.split(16)])
    torch.testing.assert_close(batch, alone, **CLOSE)


def test_a_dense_batch_must_divide_its_tokens(tokens: Tensor) -> None:
    model = Transformer(SIGMA).initialise(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="multiple of the batch 5, got 48"):
        model(tokens, torch.arange(48), DenseAttend(5))


def test_training_and_inference_use_the_same_numbers(fill: Callable[..., None], tokens: Tensor) -> None:
    """With gradients the linear layers are torch's, without them our kernel."""
    model = Transformer(SIGMA)
    fill(model)
    trained = whole(model, tokens)
    assert trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(whole(model, tokens), trained, **CLOSE)


@torch.no_grad()
def test_a_cast_model_still_knows_positions_beyond_256(fill: Callable[..., None], tokens: Tensor) -> None:
    """bfloat16 has 8 significant bits: angles rounded to it would make neighbours of position 1000 one place."""
    model = Transformer(SIGMA)
    fill(model)
    direct = Transformer(SIGMA, dtype=torch.bfloat16)
    direct.load_state_dict(model.state_dict())
    positions = torch.arange(1001, 1049)
    expected = direct.logits(direct(tokens, positions, DenseAttend(1)))
    cast = model.to(torch.bfloat16)
    assert torch.equal(cast.logits(cast(tokens, positions, DenseAttend(1))), expected)
    at_zero = cast.logits(cast(tokens, positions - 1001, DenseAttend(1)))
    # The same text elsewhere: only the rounding of a bfloat16 model may differ, measured as a share of all variation.
    assert (expected - at_zero).square().mean() < 0.01 * expected.var()


def test_initialise_is_reproducible_and_keeps_the_residual_stream_level() -> None:
    deep = replace(SIGMA, layers=24, windows=(), tie_embeddings=False, qkv_bias=True, o_bias=True)
    model = Transformer(deep).initialise(torch.Generator().manual_seed(3))
    again = Transformer(deep).initialise(torch.Generator().manual_seed(3))
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert abs(model.embed.std().item() - 0.02) < 0.001
    assert abs(model.blocks[0].down.weight.std().item() - 0.02 / 48**0.5) < 0.0003
    assert bool((model.blocks[3].attention_norm == 1).all())
    assert not model.blocks[3].o.bias.any()
    logits = whole(model, torch.arange(61))
    assert abs(F.cross_entropy(logits, torch.arange(61)).item() - math.log(61)) < 0.2


@torch.no_grad()
def test_stories260k_writes_its_known_text(data: Callable[[str], Path]) -> None:
    folder = data("stories260k")
    expected = json.loads((folder / "expected_greedy.json").read_text())["ids"]
    model = load_model(folder)
    assert model.embed.dtype == torch.float32
    # Greedy: every token is the best after those before it, so one pass over the known text checks all choices.
    assert whole(model, torch.tensor(expected))[:-1].argmax(-1).tolist() == expected[1:]
