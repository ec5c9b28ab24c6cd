"""Tiny random checkpoints made by transformers, with the byte tokenizer, and texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from anabranch.train.tokenizer import write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`make_checkpoint(family, **config)` saves a random model of 4 K heads, with its tokenizer."""

    def make(family: str, **changes: Any) -> Path:
        config_class, model_class = CLASSES[family]
        model = model_class(config_class(**{**SIZES, **changes}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith(("norm", "norm.weight")):
                    parameter.copy_(1 + 0.3 * noise)
                else:
                    parameter.copy_(0.4 * noise if "embed" in name else noise / parameter.shape[-1] ** 0.5)
        folder = tmp_path / family
        model.save_pretrained(folder)
        write_tokenizer(folder, context=SIZES["max_position_embeddings"])
        return folder

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of twelve different texts."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for j in range(12 + i)))
    return folder
