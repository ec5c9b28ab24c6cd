"""What a config.json may say, what it may not, and what follows from it."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from anabranch.models.config import FAMILIES, ModelConfig
from anabranch.models.rotary import RopeScaling
from anabranch.models.transformer import Transformer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
SIGMA = {**LLAMA, "model_type": "sigma", "num_key_heads": 1, "num_value_heads": 4}

# Table 14 of arXiv 2501.13629.
SIGMA_1_5B = ModelConfig(
    family="sigma", vocab_size=128256, hidden_size=2048, ffn_size=6144, layers=26, q_heads=32, k_heads=4, v_heads=16,
    k_dim=64, v_dim=64, q_intermediate_size=3072, rope_theta=5e4, max_position=32768, tie_embeddings=True,
)  # fmt: skip
SIGMA_10B = replace(
    SIGMA_1_5B, hidden_size=4096, ffn_size=14336, layers=32, k_dim=128, v_dim=128, q_intermediate_size=6144, windows=()
)


def test_defaults_are_those_of_each_family() -> None:
    llama = ModelConfig.from_json(LLAMA)
    assert (llama.k_heads, llama.v_heads, llama.k_dim, llama.v_dim) == (4, 4, 8, 8)
    assert (llama.rope_theta, llama.rope_scaling, llama.norm_eps) == (10_000.0, None, 1e-6)
    assert (llama.tie_embeddings, llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (False,) * 5
    assert (llama.windows, llama.bos_id, llama.eos_ids) == ((None, None), None, ())
    assert ModelConfig.from_json({**QWEN, "model_type": "mistral"}).windows == (4096, 4096)
    assert ModelConfig.from_json({**QWEN, "model_type": "mistral", "sliding_window": None}).windows == (None, None)
    qwen2, qwen3 = ModelConfig.from_json(QWEN), ModelConfig.from_json({**QWEN, "model_type": "qwen3"})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.k_dim) == (True, False, False, 8)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.k_dim) == (False, False, True, 128)


def test_windows_of_qwen() -> None:
    base = {**QWEN, "num_hidden_layers": 4, "sliding_window": 9}
    assert ModelConfig.from_json(base).windows == (None,) * 4
    used = {**base, "use_sliding_window": True, "max_window_layers": 3}
    assert ModelConfig.from_json(used).windows == (None, None, None, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert ModelConfig.from_json({**used, "layer_types": kinds}).windows == (9, None, None, 9)
    with pytest.raises(ValueError, match="for each of 4 layers, got"):
        ModelConfig.from_json({**used, "layer_types": kinds[:3]})
    with pytest.raises(ValueError, match="'chunked_attention'"):
        ModelConfig.from_json({**used, "layer_types": [*kinds[:3], "chunked_attention"]})
    with pytest.raises(ValueError, match="use_sliding_window or sliding_window is not set"):
        ModelConfig.from_json({**base, "layer_types": kinds})


def test_sigma_keys() -> None:
    config = ModelConfig.from_json({**SIGMA, "q_intermediate_size": 48, "k_head_dim": 4, "augq_residual": True})
    assert (config.k_heads, config.v_heads, config.k_dim, config.v_dim) == (1, 4, 4, 8)
    assert (config.q_intermediate_size, config.augq_residual) == (48, True)
    assert (config.q_width, config.k_width, config.v_width, config.o_width) == (16, 4, 32, 32)
    wide = ModelConfig.from_json({**SIGMA, "head_dim": 16, "v_head_dim": 6})
    assert (wide.k_dim, wide.v_dim, wide.q_intermediate_size) == (16, 6, None)


EVERYTHING = ModelConfig(
    family="sigma", vocab_size=99, hidden_size=32, ffn_size=40, layers=2, q_heads=12, k_heads=4, v_heads=3, k_dim=4,
    v_dim=6, max_position=256, q_intermediate_size=24, augq_residual=True, rope_theta=5e4,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=64), norm_eps=1e-5, tie_embeddings=True,
    qkv_bias=True, o_bias=True, mlp_bias=True, bos_id=1, eos_ids=(2, 7),
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        replace(EVERYTHING, o_bias=False, windows=(4, None)),
        ModelConfig.from_json({**LLAMA, "eos_token_id": 2, "attention_bias": True}),
        ModelConfig.from_json({**QWEN, "model_type": "mistral", "sliding_window": 7}),
        ModelConfig.from_json({**QWEN, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
        ModelConfig.from_json({**QWEN, "model_type": "qwen3", "tie_word_embeddings": True}),
    ],
    ids=lambda config: config.family,
)
def test_what_is_written_is_read_back(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sigma"])
def test_transformers_reads_what_is_written(family: str, tmp_path: Path) -> None:
    config = replace(ModelConfig.from_json({**QWEN, "model_type": family}), bos_id=1, eos_ids=(2, 7), norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    peer = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(peer).__name__.lower() == f"{family}config"
    assert (peer.num_key_value_heads, peer.head_dim) == (2, config.k_dim) if family != "qwen2" else (2, 8)
    assert (peer.rms_norm_eps, peer.eos_token_id, peer.rope_parameters["rope_theta"]) == (1e-5, [2, 7], 10_000.0)
    assert ModelConfig.from_json(peer.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"unsupported model_type 'gpt2'; choose one of \['llama', 'mistral', ",
        ),
        ({"model_type": None}, "unsupported model_type None"),
        ({"vocab_size": None, "hidden_size": None}, r"must have the keys \['vocab_size', 'hidden_size'\]"),
        ({"model_type": "qwen2"}, r"must have the keys \['num_key_value_heads'\]"),
        ({"model_type": "sigma"}, r"must have the keys \['num_key_heads', 'num_value_heads'\]"),
        ({"hidden_size": "32"}, "hidden_size in config.json must be an integer, got '32'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings in config.json must be true or false, got 'yes'"),
        ({"eos_token_id": ["</s>"]}, r"token ids in config.json must be integers, got \['</s>'\]"),
        ({"num_key_value_heads": 3}, "Hq must be a multiple of Hk and of Hv, got Hq=4, Hk=3, Hv=3"),
        ({"head_dim": 7}, "k_dim must be even for rotary positions, got 7"),
        ({"num_hidden_layers": 0}, "layers must be at least 1, got 0"),
        ({"hidden_act": "gelu"}, "not implemented: {'hidden_act': 'gelu'}"),
        ({"partial_rotary_factor": 0.5}, "not implemented: {'partial_rotary_factor': 0.5}"),
        ({"partial_rotary_factor": 0}, "not implemented: {'partial_rotary_factor': 0}"),
        ({"quantization_config": {"quant_method": "gptq"}}, "not implemented: {'quantization_config'"),
        ({"attn_logit_softcapping": 50.0}, "not implemented: {'attn_logit_softcapping': 50.0}"),
        ({"sliding_window": 4096}, "not implemented: {'sliding_window': 4096}"),
        ({"q_intermediate_size": 48}, "not implemented: {'q_intermediate_size': 48}"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unsupported rope type 'dynamic'"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True}, "{'attention_bias': True}"),
        ({"model_type": "qwen3", "num_key_value_heads": 2, "mlp_bias": True}, "{'mlp_bias': True}"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    keys = {**LLAMA, **changes}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(keys)


def test_keys_that_change_nothing_are_accepted() -> None:
    harmless = {
        "torch_dtype": "bfloat16", "dtype": "bfloat16", "use_cache": False, "pretraining_tp": 1, "hidden_act": "silu",
        "transformers_version": "4.44.0", "_name_or_path": "x", "attention_dropout": 0.1, "initializer_range": 0.02,
        "partial_rotary_factor": 1.0, "quantization_config": None, "pruned_heads": {}, "attention_bias": False,
    }  # fmt: skip
    assert ModelConfig.from_json({**LLAMA, **harmless}) == ModelConfig.from_json(LLAMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt2"}, "unsupported model_type 'gpt2'"),
        ({"family": "llama"}, "need family 'sigma', got 'llama'"),
        ({"q_intermediate_size": None}, "augq_residual needs a q_intermediate_size"),
        ({"q_intermediate_size": 0}, "q_intermediate_size must be None or at least 1, got 0"),
        ({"v_heads": 5}, "got Hq=12, Hk=4, Hv=5"),
        ({"qkv_bias": False}, r"\(True, False\), \(True, True\)\] for family 'sigma', got \(False, True\)"),
        ({"qk_norm": True}, "qk_norm must be False for family 'sigma'"),
        ({"windows": (4,)}, r"one entry per layer \(2\), got 1"),
        ({"windows": (4, 0)}, "a window must be None or at least 1"),
        ({"windows": (4, 5)}, r"family 'sigma' cannot have the windows \(4, 5\)"),
        ({"v_dim": 0}, "v_dim must be at least 1, got 0"),
    ],
)
def test_a_configuration_is_checked_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EVERYTHING, **changes)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.layers = 3  # type: ignore[misc]


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5, "bos_token_id": 1}))
    assert ModelConfig.load(tmp_path).eos_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5], "bos_token_id": 1}))
    assert ModelConfig.load(tmp_path).eos_ids == (5, 9)


@pytest.mark.parametrize(("config", "kib_per_token"), [(SIGMA_1_5B, 65), (SIGMA_10B, 160)])
def test_cache_bytes_of_the_published_models(config: ModelConfig, kib_per_token: int) -> None:
    """bfloat16: layers * (4 + 16) heads * width * 2 bytes; int8 keys beside bfloat16 values save half of a fifth."""
    assert config.cache_bytes_per_token(2, 2) == kib_per_token * 1024
    assert config.cache_bytes_per_token(1, 2) == kib_per_token * 1024 * 9 // 10


@pytest.mark.parametrize(("config", "billions"), [(SIGMA_1_5B, 2.02), (SIGMA_10B, 9.99)])
def test_parameters_of_the_published_models(config: ModelConfig, billions: float) -> None:
    """The sizes of Table 14 with AugQ counted and tied embeddings."""
    parameters = sum(parameter.numel() for parameter in Transformer(config, device="meta").parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.005)
