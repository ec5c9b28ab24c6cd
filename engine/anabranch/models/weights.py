"""Checkpoints in Hugging Face's names, to and from the fused matrices of Transformer.

One table (`_views`) says where every published tensor lies in the model; loading copies into those views and saving
writes them, so a model is never held twice and the two directions cannot disagree.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from anabranch.common.checkpoint import SINGLE, Checkpoint, write_json, write_safetensors
from anabranch.models.config import ModelConfig
from anabranch.models.layers import Linear
from anabranch.models.transformer import Block, Transformer
from anabranch_kernels.memory import prefer_huge_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = ("BF16", "F16", "F32", "F64")  # what is converted on the way in; 8-bit floats need scales to mean anything
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old checkpoints store what the config already says
_SHOWN = 6  # names per kind in an error


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Read a model folder (config.json and safetensors, single or sharded) into a Transformer.

    dtype    of the weights in memory; None keeps the one they are stored in
    Raises ValueError when the folder, its config or its weights are missing or of a kind that is not implemented, and
    names every tensor that is missing, unexpected, misshapen or of a dtype that cannot be computed with.
    """
    config = ModelConfig.load(folder)
    checkpoint = Checkpoint(folder)
    _check(checkpoint, config)
    dtype = checkpoint.read(EMBED).dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(known) for known in DTYPES]}, got {dtype}")
    model = Transformer(config, dtype=dtype, device=device)
    for parameter in model.parameters():
        prefer_huge_pages(parameter)
    with torch.no_grad():
        for name, view in _views(model).items():
            view.copy_(checkpoint.read(name))
    return model.eval()


def save_model(model: Transformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's names; each file is replaced whole or not at all."""
    folder = Path(folder)
    write_safetensors(folder / SINGLE, _views(model))
    write_json(folder / "config.json", {**model.config.to_json(), "torch_dtype": str(model.embed.dtype).split(".")[1]})


def _views(model: Transformer) -> dict[str, Tensor]:
    """The published name of every tensor and the part of the model that holds it."""
    views = {EMBED: model.embed.data, "model.norm.weight": model.norm.data}
    if not model.config.tie_embeddings:
        views[HEAD] = model.head.data
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        views |= {f"model.layers.{layer}.{name}": view for name, view in _block_views(model.config, block).items()}
    return views


def _block_views(config: ModelConfig, block: Block) -> dict[str, Tensor]:
    views = {
        "input_layernorm.weight": block.attention_norm.data,
        "post_attention_layernorm.weight": block.ffn_norm.data,
        **_rows(block.qkv, "self_attn", q_proj=config.q_width, k_proj=config.k_width, v_proj=config.v_width),
        **_rows(block.o, "self_attn", o_proj=config.hidden_size),
        **_rows(block.gate_up, "mlp", gate_proj=config.ffn_size, up_proj=config.ffn_size),
        **_rows(block.down, "mlp", down_proj=config.hidden_size),
    }
    if config.qk_norm:
        views |= {"self_attn.q_norm.weight": block.q_norm.data, "self_attn.k_norm.weight": block.k_norm.data}
    if (width := config.q_intermediate_size) is not None:
        views |= _rows(block.augq_gate_up, "self_attn", q_gate_proj=width, q_up_proj=width)
        views |= _rows(block.augq_down, "self_attn", q_down_proj=config.q_width)
    return views


def _rows(linear: Linear, prefix: str, **widths: int) -> dict[str, Tensor]:
    """The weights, and biases if any, of the projections stored one after another in a fused matrix."""
    views: dict[str, Tensor] = {}
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            parts = tensor.data.split(list(widths.values()))
            views |= {f"{prefix}.{name}.{kind}": part for name, part in zip(widths, parts, strict=True)}
    return views


def _check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names and shapes before memory is taken; one error names all differences."""
    wanted = {name: list(view.shape) for name, view in _views(Transformer(config, device="meta")).items()}
    found = checkpoint.shapes
    surplus = {HEAD} if config.tie_embeddings else set()
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(name for name in found.keys() - wanted.keys() - surplus if not _DERIVED.search(name)),
        "misshapen": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
        f"stored in none of {list(FLOATS)}": [
            f"{name} ({checkpoint.dtypes[name]})" for name in wanted if checkpoint.dtypes.get(name, "F32") not in FLOATS
        ],
    }
    if any(problems.values()):
        lines = [
            f"{len(names)} tensors {kind}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(f"{checkpoint.folder} does not fit its config.json ({config.family}): {'; '.join(lines)}")
    if surplus & found.keys() and not torch.equal(checkpoint.read(EMBED), checkpoint.read(HEAD)):
        raise ValueError(
            f"config.json of {checkpoint.folder} ties the embeddings, but {HEAD} differs from {EMBED}; "
            "set tie_word_embeddings to false to use both"
        )
