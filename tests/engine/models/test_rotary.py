"""Rotary positions against complex numbers and against transformers' frequencies."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anabranch.models.rotary import RopeScaling, read_rope, rotary_frequencies, rotate, write_rope

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3 of Llama 3.2": {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, own betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
}


def turn(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    angles = positions[:, None, None] * rotary_frequencies(x.shape[-1], theta)
    return rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


@pytest.mark.parametrize("D", [2, 8, 64, 128])
def test_a_head_turns_like_complex_numbers(D: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, positions = torch.randn(5, 3, D, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 17, 300])
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angles = positions[:, None, None] * 10_000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    # Angles are float32: at position 300 one rounding is 300 * 2**-24.
    torch.testing.assert_close(
        turn(x, positions), torch.cat([turned.real, turned.imag], -1), atol=3 * 300 * 2.0**-24, rtol=0
    )


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_scores_depend_on_the_distance_of_positions_alone(query: int, key: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(a: int, b: int) -> torch.Tensor:
        return (turn(q, torch.tensor([a])) * turn(k, torch.tensor([b]))).sum()

    # |q| |k| is about 16, the angles carry up to 4000 * 2**-24 of rounding each.
    torch.testing.assert_close(score(query + shift, key + shift), score(query, key), atol=2e-2, rtol=0)


def peer_config(rope: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500_000.0, **rope},
    )  # fmt: skip


@pytest.mark.parametrize("case", SCALINGS)
def test_frequencies_equal_those_of_transformers(case: str) -> None:
    config = peer_config(SCALINGS[case])
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[SCALINGS[case]["rope_type"]](config)
    theta, scaling = read_rope({"rope_parameters": config.to_dict()["rope_parameters"]}, 131072)
    assert theta == 500_000.0
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    signed = rotary_frequencies(128, theta, scaling)
    assert torch.equal(signed[:64], -signed[64:])
    # A few float32 roundings; half of the pairs must really have been stretched for this to say anything.
    torch.testing.assert_close(signed[64:], frequencies, rtol=1e-6, atol=0)
    assert not torch.allclose(signed, rotary_frequencies(128, theta), rtol=1e-3)


def test_unscaled_frequencies_are_bitwise_those_of_transformers() -> None:
    model = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(peer_config({"rope_type": "default"}))
    assert torch.equal(rotary_frequencies(128, 500_000.0)[64:], model.inv_freq)


@pytest.mark.parametrize("case", SCALINGS)
def test_what_is_written_is_read_back(case: str) -> None:
    read = read_rope({"rope_parameters": {"rope_theta": 500_000.0, **SCALINGS[case]}}, 131072)
    assert read_rope(write_rope(*read), 131072) == read


def test_all_spellings_mean_the_same() -> None:
    scaling = RopeScaling(kind="linear", factor=2.0)
    for keys in (
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None, "rope_theta": 1e6},
    ):
        assert read_rope(dict(keys), 64) == (1e6, scaling)
    assert read_rope({}, 64) == (10_000.0, None)
    assert read_rope({"rope_scaling": {"rope_type": "default"}, "rope_theta": 7.0}, 64) == (7.0, None)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            r"rope type 'dynamic'; choose one of \['default', 'linear'",
        ),
        ({"type": "su", "long_factor": [1.0]}, "unsupported rope type 'su'"),
        ({"rope_type": "longrope"}, "unsupported rope type 'longrope'"),
        ({"rope_type": "linear"}, "'linear' needs a factor"),
        ({"rope_type": "llama3", "factor": 8.0}, r"'llama3' needs \['low_freq_factor', 'high_freq_factor'\]"),
        ({"rope_type": "yarn", "factor": 8.0, "truncate": False}, "not implemented: {'truncate': False}"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "not implemented: {'mrope_section'"),
        ({"rope_type": "linear", "factor": -1.0}, "must be positive, got -1.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rope({"rope_parameters": rope}, 64)


def test_scaling_needs_a_known_kind_and_an_original_context() -> None:
    with pytest.raises(ValueError, match="unknown rope scaling 'ntk'"):
        RopeScaling(kind="ntk", factor=2.0)
    with pytest.raises(ValueError, match="'llama3' needs an original_max_position"):
        RopeScaling(kind="llama3", factor=2.0)
