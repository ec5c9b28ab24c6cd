"""Rotary positions in the half-rotation form of Llama, and the ways checkpoints stretch them to longer contexts.

A head of width D is D/2 pairs (x[i], x[i + D/2]); at position p pair i turns by the angle p * f[i]. With the signed
frequencies (-f, f) that is x * cos(angle) + roll(x, D/2) * sin(angle): no halves are cut and none is negated.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("linear", "llama3", "yarn")
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context a model was first trained on.

    kind                   "linear" (all by `factor`), "llama3" (Llama 3.1) or "yarn" (arXiv 2309.00071)
    original_max_position  that first context, for llama3 and yarn
    low_freq_factor, high_freq_factor    turns within it below and above which llama3 stretches fully and not at all
    beta_slow, beta_fast   the same for yarn
    attention_factor       what yarn multiplies cos and sin by
    """

    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown rope scaling {self.kind!r}; choose one of {list(KINDS)}")
        if self.factor <= 0:
            raise ValueError(f"the factor of rope scaling must be positive, got {self.factor}")
        if self.kind != "linear" and self.original_max_position < 1:
            raise ValueError(f"rope scaling {self.kind!r} needs an original_max_position of at least 1")


def rotary_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Signed angle per position of every element of a head: [dim] float32, the first half negative.

    Computed in float32 like the implementations models are trained with: at position 100 000 the rounding of a
    frequency is already worth 0.006 radians, and being closer to the real number than they are would not help.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    if scaling is not None:
        stretch = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.kind]
        frequencies = stretch(frequencies, theta, scaling)
    return torch.cat([-frequencies, frequencies])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x [T, H, D] to their positions; cos and sin [T, 1, D] of position * rotary_frequencies."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _linear(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Stretch waves that turn less than `low_freq_factor` times in the original context, blend up to `high`."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Like llama3, but the blend is linear in the index of the pair, between the pairs that turn beta times."""
    pairs = len(frequencies)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(scaling.original_max_position / (times * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * pairs - 1)
    stretched = ((torch.arange(pairs) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies


def read_rope(keys: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """Take theta and scaling out of the keys of a config.json: `rope_theta` and `rope_scaling` as transformers wrote
    them up to version 4, or `rope_parameters` as version 5 does. ValueError names what is not implemented."""
    theta = keys.pop("rope_theta", None)
    old, new = keys.pop("rope_scaling", None), keys.pop("rope_parameters", None)
    rope = dict(new or old or {})
    theta = float(rope.pop("rope_theta", None) or theta or DEFAULT_THETA)
    names = {rope.pop("rope_type", None), rope.pop("type", None)} - {None, "default"}
    kind = names.pop() if names else "default"
    if kind not in ("default", *KINDS) or names:
        raise ValueError(f"unsupported rope type {kind!r}; choose one of {['default', *KINDS]}")
    scaling = _read_scaling(kind, rope, max_position) if kind != "default" else None
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError("partial_rotary_factor other than 1 is not implemented")
    left = {name: value for name, value in rope.items() if value is not None}
    if left:
        raise ValueError(f"rope type {kind!r} has settings that are not implemented: {left}")
    return theta, scaling


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of a config.json that `read_rope` and every version of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_position
    more = {"llama3": ["low_freq_factor", "high_freq_factor"], "yarn": ["beta_slow", "beta_fast", "attention_factor"]}
    rope |= {name: getattr(scaling, name) for name in more.get(scaling.kind, [])}
    return {"rope_theta": theta, "rope_scaling": rope}


def _read_scaling(kind: str, rope: dict[str, Any], max_position: int) -> RopeScaling:
    factor = rope.pop("factor", None)
    original = rope.pop("original_max_position_embeddings", None) or max_position
    if factor is None and kind == "yarn":
        factor = max_position / original
    if factor is None:
        raise ValueError(f"rope type {kind!r} needs a factor")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    if kind == "llama3":
        missing = [name for name in ("low_freq_factor", "high_freq_factor") if rope.get(name) is None]
        if missing:
            raise ValueError(f"rope type 'llama3' needs {missing}")
        low, high = rope.pop("low_freq_factor"), rope.pop("high_freq_factor")
        return RopeScaling(
            kind=kind, factor=factor, original_max_position=original, low_freq_factor=low, high_freq_factor=high
        )
    rope.pop("finetuned", None)  # a remark
    if rope.get("truncate") is True:
        rope.pop("truncate")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original,
        beta_slow=rope.pop("beta_slow", None) or 1.0,
        beta_fast=rope.pop("beta_fast", None) or 32.0,
        attention_factor=_yarn_attention_factor(factor, rope),
    )


def _yarn_attention_factor(factor: float, rope: dict[str, Any]) -> float:
    given, mscale, mscale_all = (rope.pop(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)

    def temperature(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
