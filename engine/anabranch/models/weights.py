"""Checkpoints in Hugging Face's names, to and from the fused matrices of Transformer.

One table (`_places`) says where every published tensor lies in the model; loading copies into those places and saving
writes them, so a model is never held twice and the two directions cannot disagree. It also says which rows and columns
of the published tensor lie there: all of them, or a rank's. Files are mapped, so a rank leaves the rest on the disk.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.common.checkpoint import SINGLE, Checkpoint, write_json, write_safetensors
from anabranch.models.config import ModelConfig
from anabranch.models.layers import Linear
from anabranch.models.shard import Group, Shard, rows_of
from anabranch.models.transformer import Block, Transformer
from anabranch_kernels.memory import prefer_huge_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = ("BF16", "F16", "F32", "F64")  # what is converted on the way in; 8-bit floats need scales to mean anything
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old checkpoints store what the config already says
_SHOWN = 6  # names per kind in an error


class Place(NamedTuple):
    """Where the model holds a published tensor, and which rows and columns of it."""

    view: Tensor
    part: tuple[slice, ...] = ()


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> Transformer:
    """Read a model folder (config.json and safetensors, single or sharded) into a Transformer.

    dtype    of the weights in memory; None keeps the one they are stored in
    group    the ranks that share the model: only this rank's part of each tensor is read
    Raises ValueError when the folder, its config or its weights are missing or of a kind that is not implemented, and
    names every tensor that is missing, unexpected, misshapen or of a dtype that cannot be computed with.
    """
    config = ModelConfig.load(folder)
    checkpoint = Checkpoint(folder)
    _check(checkpoint, config)
    dtype = checkpoint.read(EMBED).dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(known) for known in DTYPES]}, got {dtype}")
    model = Transformer(config, dtype=dtype, device=device, group=group)
    for parameter in model.parameters():
        prefer_huge_pages(parameter)
    with torch.no_grad():
        for name, (view, part) in _places(model).items():
            view.copy_(checkpoint.read(name)[part])
    return model.eval()


def save_model(model: Transformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's names; each file is replaced whole or not at all."""
    if model.group is not None:
        raise ValueError(f"only whole models are saved, got the part of rank {model.group.rank} of {model.group.size}")
    folder = Path(folder)
    write_safetensors(folder / SINGLE, {name: place.view for name, place in _places(model).items()})
    write_json(folder / "config.json", {**model.config.to_json(), "torch_dtype": str(model.embed.dtype).split(".")[1]})


def projections(model: Transformer) -> dict[str, tuple[str, slice]]:
    """The published name of every projection -> the fused matrix that holds it, by its name in the model, and its rows.

    Of a whole model; its linear layers are then `model.layers.0.self_attn.q_proj` and so on, as everybody knows them.
    """
    modules = {module.weight.data_ptr(): name for name, module in model.named_modules() if isinstance(module, Linear)}
    found = {}
    for name, place in _places(model).items():
        view = place.view
        start = view.untyped_storage().data_ptr()
        if name.endswith("_proj.weight"):
            row = (view.data_ptr() - start) // (view.stride(0) * view.element_size())
            found[name.removesuffix(".weight")] = (modules[start], slice(row, row + len(view)))
    return found


def _places(model: Transformer) -> dict[str, Place]:
    """The published name of every tensor and the part of the model that holds it."""
    places = {EMBED: Place(model.embed.data), "model.norm.weight": Place(model.norm.data)}
    if not model.config.tie_embeddings:
        places[HEAD] = Place(model.head.data, (_slice(model.shard.vocab),))
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        places |= {f"model.layers.{layer}.{name}": place for name, place in _block_places(model.shard, block).items()}
    return places


def _block_places(shard: Shard, block: Block) -> dict[str, Place]:
    config, hidden = shard.whole, range(shard.whole.hidden_size)
    k, v = rows_of(shard.k_heads, config.k_dim), rows_of(shard.v_heads, config.v_dim)
    heads = rows_of(shard.q_heads, config.v_dim)  # as attention returns them
    places = {
        "input_layernorm.weight": Place(block.attention_norm.data),
        "post_attention_layernorm.weight": Place(block.ffn_norm.data),
        **_rows(block.qkv, "self_attn", hidden, q_proj=shard.q_proj, k_proj=k, v_proj=v),
        **_rows(block.o, "self_attn", heads, o_proj=hidden),
        **_rows(block.gate_up, "mlp", hidden, gate_proj=shard.ffn, up_proj=shard.ffn),
        **_rows(block.down, "mlp", shard.ffn, down_proj=hidden),
    }
    if config.qk_norm:
        places["self_attn.q_norm.weight"] = Place(block.q_norm.data)
        places["self_attn.k_norm.weight"] = Place(block.k_norm.data)
    if config.q_intermediate_size is not None:
        q, inner = shard.q_proj, shard.augq
        places |= _rows(block.augq_gate_up, "self_attn", q, q_gate_proj=inner, q_up_proj=inner)
        places |= _rows(block.augq_down, "self_attn", inner, q_down_proj=q)
    return places


def _rows(linear: Linear, prefix: str, columns: range, **rows: range) -> dict[str, Place]:
    """The weights, and biases if any, of the projections stored one after another in a fused matrix."""
    places: dict[str, Place] = {}
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            views = tensor.data.split([len(run) for run in rows.values()])
            for (name, run), view in zip(rows.items(), views, strict=True):
                places[f"{prefix}.{name}.{kind}"] = Place(view, (_slice(run), _slice(columns))[: view.ndim])
    return places


def _slice(run: range) -> slice:
    return slice(run.start, run.stop)


def _check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names and shapes before memory is taken; one error names all differences."""
    whole = _places(Transformer(config, device="meta"))
    wanted = {name: list(place.view.shape) for name, place in whole.items()}
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
