"""Tiny random checkpoints made by transformers, and attention over a paged cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from anabranch.models.config import ModelConfig
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention is peaked and every part moves the logits by far more than a tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm", "norm.weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif "embed" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """`make_checkpoint(family, **config)` saves a random model and returns its folder and transformers' own model."""

    def make(family: str, *, shard: str = "5GB", **changes: Any) -> tuple[Path, torch.nn.Module]:
        config_class, model_class = CLASSES[family]
        config = config_class(**{**SIZES, **changes})
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomise(model)
        model.tie_weights()
        model.save_pretrained(tmp_path / family, max_shard_size=shard)
        return tmp_path / family, model

    return make


class PagedAttend:
    """One sequence in pages of four tokens that lie in the pools in reverse order; `grow` announces new tokens."""

    PAGE, PAGES = 4, 16

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        def pool(heads: int, width: int) -> list[Tensor]:
            return [torch.full((self.PAGES, heads, self.PAGE, width), torch.nan, dtype=dtype) for _ in config.windows]

        self.k_pools, self.v_pools = pool(config.k_heads, config.k_dim), pool(config.v_heads, config.v_dim)
        self.pages = torch.arange(self.PAGES - 1, -1, -1, dtype=torch.int32)
        self.length = 0

    def grow(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens, which the next call of the model then brings."""
        positions = torch.arange(self.length, self.length + tokens)
        self.slots = self.pages[positions // self.PAGE].long() * self.PAGE + positions % self.PAGE
        self.length += tokens
        return positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        store_kv(k, v, self.k_pools[layer], self.v_pools[layer], self.slots)
        lengths, starts = torch.tensor([self.length]), torch.tensor([0, len(q)])
        out = paged_attention(
            q, self.k_pools[layer], self.v_pools[layer], self.pages[None], lengths.int(), starts.int(), window=window
        )
        assert isinstance(out, Tensor)
        return out


@pytest.fixture
def paged_attend() -> type[PagedAttend]:
    return PagedAttend


@pytest.fixture
def fill() -> Callable[..., None]:
    """`fill(module, seed)` gives every weight a random value."""
    return randomise


@pytest.fixture
def tokens() -> Tensor:
    """A text of 48 tokens."""
    return torch.randint(SIZES["vocab_size"], (48,), generator=torch.Generator().manual_seed(1))
