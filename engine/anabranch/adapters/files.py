"""Adapters on disk: plain LoRA as PEFT's own folders, the others as safetensors beside a JSON of settings.

Both hold `adapter_config.json` and `adapter_model.safetensors`, with PEFT's names of tensors where PEFT has the method,
so that either library loads what the other saved.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anabranch.adapters.attach import Adapter, attach, linear_layers
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import TriAdapt, TriAdaptSettings
from anabranch.common.checkpoint import read_json, write_json, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
METHODS: dict[str, tuple[Any, Any]] = {
    "rank_lora": (RankLora, RankLoraSettings), "triadapt": (TriAdapt, TriAdaptSettings),
}  # fmt: skip
PEFT = {
    "peft_type": "LORA", "task_type": None, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True,
}  # fmt: skip
# What changes what a PEFT LoRA computes and is not computed here.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


def save_adapters(folder: str | Path, adapters: Mapping[str, Adapter], *, base_model: str | None = None) -> None:
    """Write the adapters of a model, each file whole or not there.

    base_model   what PEFT's config is to call the model they belong to

    Raises ValueError if they are not all of one kind and settings.
    """
    kinds = {(type(adapter), adapter.settings) for adapter in adapters.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of one folder share their settings, got {sorted(map(str, kinds))}")
    settings = next(iter(adapters.values())).settings
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"base_model_name_or_path": base_model, "target_modules": list(adapters)}
    if isinstance(settings, RankLoraSettings) and settings.chosen is None:
        config |= {**PEFT, "r": settings.ranks, "lora_alpha": settings.alpha}
        tensors = _as_peft(adapters)
    else:
        method = next(name for name, (_, kind) in METHODS.items() if isinstance(settings, kind))
        config |= {"peft_type": method.upper(), "settings": asdict(settings)}
        tensors = {f"{name}.{key}": x for name, adapter in adapters.items() for key, x in adapter.state_dict().items()}
    write_safetensors(out / WEIGHTS, tensors)
    write_json(out / CONFIG, config)


def load_adapters(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None) -> dict[str, Adapter]:
    """Attach the adapters of a folder to a model; returns them as `attach` does.

    dtype   of their weights; that of each layer's own if None

    Raises ValueError for a folder that is none, methods and options that are not computed here, layers that the model
    does not have and tensors of other sizes.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; only safetensors are loaded")
    tensors = load_file(folder / WEIGHTS)
    method = str(config.get("peft_type", "")).lower()
    if method == "lora":
        return _from_peft(model, config, tensors, dtype)
    if method not in METHODS:
        raise ValueError(
            f"{folder / CONFIG}: peft_type must be LORA, {', '.join(map(str.upper, METHODS))}, got {method!r}"
        )
    kind, settings_of = METHODS[method]
    settings = settings_of(**config["settings"])

    def adapter_of(name: str, inputs: int, outputs: int, weight: Tensor) -> Adapter:
        adapter: Adapter = kind(inputs, outputs, settings, dtype=dtype or weight.dtype, device=weight.device)
        return adapter

    adapters = _attach_exactly(model, config["target_modules"], adapter_of)
    for name, adapter in adapters.items():
        mine = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        _fill(adapter, mine, name)
    return adapters


def _as_peft(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = adapter.a
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = adapter.b.T
    return tensors


def _from_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Adapter]:
    wrong = [key for key in UNSUPPORTED if config.get(key)]
    if wrong or config.get("bias", "none") != "none":
        raise ValueError(f"this LoRA uses {wrong or ['bias']}, which is not supported: plain A and B are")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if not name or part not in ("A.weight", "B.weight"):
            raise ValueError(f"tensor {key} is not the A or B of a linear layer's LoRA")
        pairs.setdefault(name, {})[part[0]] = x
    halves = [name for name, pair in pairs.items() if len(pair) < 2]
    if halves:
        raise ValueError(f"{halves[0]} has only one of lora_A and lora_B")

    def adapter_of(name: str, inputs: int, outputs: int, weight: Tensor) -> Adapter:
        r = len(pairs[name]["A"])
        alpha = _pattern(config.get("alpha_pattern"), name, float(config["lora_alpha"]))
        settings = RankLoraSettings(ranks=r, alpha=alpha * r**0.5 if config.get("use_rslora") else alpha)
        return RankLora(inputs, outputs, settings, dtype=dtype or weight.dtype, device=weight.device)

    adapters = _attach_exactly(model, list(pairs), adapter_of)
    for name, adapter in adapters.items():
        pair = {"a": pairs[name]["A"], "b": pairs[name]["B"].T}
        _fill(adapter, {**adapter.state_dict(), **pair}, name)
    return adapters


def _pattern(patterns: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    """PEFT's patterns of layers: the whole name or its end."""
    for end, value in (patterns or {}).items():
        if name == end or name.endswith(f".{end}"):
            return float(value)
    return otherwise


def _attach_exactly(
    model: nn.Module, names: list[str], adapter_of: Callable[[str, int, int, Tensor], Adapter]
) -> dict[str, Adapter]:
    def branch(name: str, inputs: int, outputs: int) -> Adapter:
        if name not in names:
            raise ValueError(f"the folder names {names[:3]} …, which are ends of other layers' names: {name}")
        return adapter_of(name, inputs, outputs, model.get_parameter(f"{places[name].module}.weight"))

    places = linear_layers(model)

    return attach(model, branch, targets=names)


def _fill(adapter: Adapter, tensors: Mapping[str, Tensor], name: str) -> None:
    wanted = {key: list(x.shape) for key, x in adapter.state_dict().items()}
    found = {key: list(x.shape) for key, x in tensors.items()}
    if wanted != found:
        raise ValueError(f"{name} needs tensors {wanted}, the file has {found}")
    adapter.load_state_dict(dict(tensors))
