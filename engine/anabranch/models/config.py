"""What a decoder-only model is made of, read from (and written to) a Hugging Face `config.json`.

Every key of the file is used, known to change nothing, or refused by name: a model that loads computes what its
authors published. Both spellings in circulation are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from anabranch.common.checkpoint import read_json
from anabranch.models.rotary import RopeScaling, read_rope, write_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "sigma")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sigma": "SigmaForCausalLM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and variants of one model. Query heads are as wide as key heads (`k_dim`); outputs are `v_dim` wide.

    q_intermediate_size    width of the gated MLP on the query (AugQ, arXiv 2501.13629), None without one
    augq_residual          q = q0 + MLP(q0) instead of the paper's q = MLP(q0)
    windows                per layer the number of latest tokens a query sees, itself included; None is all of them.
                           Empty means None everywhere
    eos_ids                every token that ends a text
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    q_heads: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    max_position: int
    q_intermediate_size: int | None = None
    augq_residual: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        _check_sizes(self)
        _check_family(self)

    @property
    def q_width(self) -> int:
        """Columns of the query projection: Hq * Dk."""
        return self.q_heads * self.k_dim

    @property
    def k_width(self) -> int:
        """Columns of the key projection: Hk * Dk."""
        return self.k_heads * self.k_dim

    @property
    def v_width(self) -> int:
        """Columns of the value projection: Hv * Dv."""
        return self.v_heads * self.v_dim

    @property
    def o_width(self) -> int:
        """Columns that attention returns: Hq * Dv."""
        return self.q_heads * self.v_dim

    def cache_bytes_per_token(self, k_bytes: int, v_bytes: int) -> int:
        """Bytes one token takes in the K and V caches of all layers, given the bytes of one element of each."""
        return self.layers * (self.k_width * k_bytes + self.v_width * v_bytes)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `config.json` of a checkpoint folder; `generation_config.json` may name more tokens that end a text."""
        folder = Path(folder)
        keys = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        more = _token_ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
        own = _token_ids(keys.get("eos_token_id"))
        return cls.from_json({**keys, "eos_token_id": list(dict.fromkeys(own + more))} if more else keys)

    @classmethod
    def from_json(cls, keys: Mapping[str, Any]) -> Self:
        """Build from the contents of a Hugging Face `config.json`; ValueError names what is missing or unsupported."""
        return cls(**_read(dict(keys)))

    def to_json(self) -> dict[str, Any]:
        """The contents of a `config.json` that `from_json` (and transformers, except for sigma) reads back."""
        return _write(self)


def _check_sizes(config: ModelConfig) -> None:
    names = ["vocab_size", "hidden_size", "ffn_size", "layers", "q_heads", "k_heads", "v_heads", "k_dim", "v_dim"]
    for name in [*names, "max_position"]:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.q_intermediate_size is not None and config.q_intermediate_size < 1:
        raise ValueError(f"q_intermediate_size must be None or at least 1, got {config.q_intermediate_size}")
    Hq, Hk, Hv = config.q_heads, config.k_heads, config.v_heads
    if Hq % Hk or Hq % Hv:
        raise ValueError(f"Hq must be a multiple of Hk and of Hv, got Hq={Hq}, Hk={Hk}, Hv={Hv}")
    if config.k_dim % 2:
        raise ValueError(f"k_dim must be even for rotary positions, got {config.k_dim}")
    if len(config.windows) != config.layers:
        raise ValueError(f"windows must have one entry per layer ({config.layers}), got {len(config.windows)}")
    if any(window is not None and window < 1 for window in config.windows):
        raise ValueError(f"a window must be None or at least 1, got {config.windows}")


def _check_family(config: ModelConfig) -> None:
    family = config.family
    if family not in FAMILIES:
        raise ValueError(f"unsupported model_type {family!r}; choose one of {list(FAMILIES)}")
    diffqkv = config.k_heads != config.v_heads or config.k_dim != config.v_dim or config.q_intermediate_size is not None
    if diffqkv and family != "sigma":
        raise ValueError(f"unequal K and V heads or widths and q_intermediate_size need family 'sigma', got {family!r}")
    if config.augq_residual and config.q_intermediate_size is None:
        raise ValueError("augq_residual needs a q_intermediate_size")
    if config.qk_norm != (family == "qwen3"):
        raise ValueError(f"qk_norm must be {family == 'qwen3'} for family {family!r}")
    attention_bias = (config.qkv_bias, config.o_bias)
    none, inner, both = (False, False), (True, False), (True, True)
    own = {"qwen2": [inner], "mistral": [none], "sigma": [none, inner, both]}
    allowed = own.get(family, [none, both])
    if attention_bias not in allowed:
        raise ValueError(f"(qkv_bias, o_bias) must be one of {allowed} for family {family!r}, got {attention_bias}")
    if config.mlp_bias and family not in ("llama", "sigma"):
        raise ValueError(f"mlp_bias needs family 'llama' or 'sigma', got {family!r}")
    windows = set(config.windows)
    few = {"llama": windows == {None}, "mistral": len(windows) == 1}
    if not few.get(family, len(windows - {None}) <= 1):
        raise ValueError(f"family {family!r} cannot have the windows {config.windows}")


# Keys that describe the file, training or transformers' own runtime: no value of theirs changes a logit.
# fmt: off
_HARMLESS = {
    "architectures", "attention_dropout", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "label2id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_cache",
}
# fmt: on
# Keys that do change the computation, with the one value that leaves it as implemented here.
_NEUTRAL = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,  # slices matrix products without changing them
    "is_decoder": True,
}


def _read(keys: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig from the keys of a config.json; takes keys out of its argument until none is left."""
    family = keys.pop("model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"unsupported model_type {family!r}; choose one of {list(FAMILIES)}")
    required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    required += ["num_key_heads", "num_value_heads"] if family == "sigma" else []
    required += [] if family in ("llama", "sigma") else ["num_key_value_heads"]
    missing = [name for name in [*required, "max_position_embeddings"] if keys.get(name) is None]
    if missing:
        raise ValueError(f"config.json of a {family} model must have the keys {missing}")
    layers, max_position = _integer(keys, "num_hidden_layers"), _integer(keys, "max_position_embeddings")
    theta, scaling = read_rope(keys, max_position)
    fields = {
        "family": family,
        "vocab_size": _integer(keys, "vocab_size"),
        "ffn_size": _integer(keys, "intermediate_size"),
        "layers": layers,
        "max_position": max_position,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": float(keys.pop("rms_norm_eps", 1e-6)),
        "tie_embeddings": _flag(keys, "tie_word_embeddings"),
        "qk_norm": family == "qwen3",
        "windows": _read_windows(keys, family, layers),
        "bos_id": next(iter(_token_ids(keys.pop("bos_token_id", None))), None),
        "eos_ids": _token_ids(keys.pop("eos_token_id", None)),
        **_read_heads(keys, family),
        **_read_biases(keys, family),
    }
    _refuse_unknown(keys, family)
    return fields


def _read_heads(keys: dict[str, Any], family: str) -> dict[str, Any]:
    hidden, Hq = _integer(keys, "hidden_size"), _integer(keys, "num_attention_heads")
    head_dim = _integer(keys, "head_dim", 128 if family == "qwen3" else hidden // Hq)
    fields = {"hidden_size": hidden, "q_heads": Hq}
    if family != "sigma":
        Hkv = _integer(keys, "num_key_value_heads", Hq)
        return {**fields, "k_heads": Hkv, "v_heads": Hkv, "k_dim": head_dim, "v_dim": head_dim}
    return {
        **fields,
        "k_heads": _integer(keys, "num_key_heads"),
        "v_heads": _integer(keys, "num_value_heads"),
        "k_dim": _integer(keys, "k_head_dim", head_dim),
        "v_dim": _integer(keys, "v_head_dim", head_dim),
        "q_intermediate_size": _integer(keys, "q_intermediate_size", 0) or None,
        "augq_residual": _flag(keys, "augq_residual"),
    }


def _read_biases(keys: dict[str, Any], family: str) -> dict[str, Any]:
    if family == "qwen2":
        return {"qkv_bias": True}
    if family == "mistral":
        return {}
    bias = _flag(keys, "attention_bias")
    o_bias = _flag(keys, "attention_output_bias", bias) if family == "sigma" else bias
    return {"qkv_bias": bias, "o_bias": o_bias, "mlp_bias": family != "qwen3" and _flag(keys, "mlp_bias")}


def _read_windows(keys: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    if family == "mistral":
        return (_optional(keys, "sliding_window", 4096),) * layers
    if family == "llama":
        return ()
    window = _optional(keys, "sliding_window", 4096)
    used, first = _flag(keys, "use_sliding_window"), _integer(keys, "max_window_layers", 28)
    window = window if used else None
    kinds = keys.pop("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != layers:
        raise ValueError(
            f"layer_types must give 'full_attention' or 'sliding_attention' for each of {layers} layers, got {kinds}"
        )
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types asks for sliding_attention, but use_sliding_window or sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse_unknown(keys: Mapping[str, Any], family: str) -> None:
    """Refuse what is left of a config.json when it could change the computation."""
    changed = {name: value for name, value in keys.items() if not _changes_nothing(name, value)}
    if changed:
        raise ValueError(
            f"config.json of this {family} model has settings that are not implemented: {changed}; "
            "delete those that do not change what the model computes"
        )


def _changes_nothing(name: str, value: Any) -> bool:
    if name in _NEUTRAL:
        return value is None or value == _NEUTRAL[name]
    return name in _HARMLESS or name.startswith("_") or value in (None, False, [], {})


def _integer(keys: dict[str, Any], name: str, default: int | None = None) -> int:
    value = keys.pop(name, None)
    value = default if value is None else value
    if not isinstance(value, int):
        raise ValueError(f"{name} in config.json must be an integer, got {value!r}")
    return value


def _optional(keys: dict[str, Any], name: str, default: int) -> int | None:
    """An integer for which null means none and only an absent key means the default."""
    keys.setdefault(name, default)
    return None if keys[name] is None and keys.pop(name) is None else _integer(keys, name)


def _flag(keys: dict[str, Any], name: str, default: bool = False) -> bool:
    value = keys.pop(name, None)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{name} in config.json must be true or false, got {value!r}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"token ids in config.json must be integers, got {value!r}")
    return ids


def _write(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if config.family == "sigma":
        keys |= {
            "num_key_heads": config.k_heads,
            "num_value_heads": config.v_heads,
            "head_dim": config.v_dim,
            "k_head_dim": config.k_dim,
            "v_head_dim": config.v_dim,
            "q_intermediate_size": config.q_intermediate_size,
            "augq_residual": config.augq_residual,
            "attention_output_bias": config.o_bias,
        }
    else:
        keys |= {"num_key_value_heads": config.k_heads, "head_dim": config.k_dim}
    if config.family in ("llama", "qwen3", "sigma"):
        keys["attention_bias"] = config.qkv_bias
    if config.family in ("llama", "sigma"):
        keys["mlp_bias"] = config.mlp_bias
    return keys | _write_windows(config)


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    window = next((window for window in config.windows if window is not None), None)
    if config.family == "mistral":
        return {"sliding_window": window}
    if config.family == "llama" or (config.family == "sigma" and window is None):
        return {}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}
