"""Adapters on disk: plain LoRA and AdaLoRA as PEFT's own folders, others as safetensors beside a JSON of settings.

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

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings
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
    "task_type": None, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True,
}  # fmt: skip
# AdaLoraSettings' names -> PEFT's.
ADALORA = {
    "initial": "init_r", "target": "target_r", "warmup": "tinit", "final": "tfinal", "interval": "deltaT",
    "steps": "total_step", "alpha": "lora_alpha", "beta1": "beta1", "beta2": "beta2",
    "orthogonality": "orth_reg_weight",
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
        config |= {**PEFT, "peft_type": "LORA", "r": settings.ranks, "lora_alpha": settings.alpha}
        tensors = _as_peft(adapters)
    elif isinstance(settings, AdaLoraSettings):
        config |= {**PEFT, "peft_type": "ADALORA", **{ADALORA[key]: x for key, x in asdict(settings).items()}}
        alive = {name: one.alive for name, one in adapters.items() if isinstance(one, AdaLora)}
        config |= {"rank_pattern": {f"{name}.lora_E": mask.tolist() for name, mask in alive.items()}}
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
    if method == "adalora":
        return _adalora_from_peft(model, config, tensors, dtype)
    if method not in METHODS:
        known = ", ".join(map(str.upper, ("lora", "adalora", *METHODS)))
        raise ValueError(f"{folder / CONFIG}: peft_type must be {known}, got {method!r}")
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
        start = f"{PEFT_PREFIX}{name}.lora_"
        if isinstance(adapter, AdaLora):
            alive = adapter.alive
            tensors |= {f"{start}A": adapter.a[alive], f"{start}E": adapter.e[alive], f"{start}B": adapter.b[alive].T}
        else:
            tensors |= {f"{start}A.weight": adapter.a, f"{start}B.weight": adapter.b.T}
    return tensors


def _parts(config: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, Any]:
    """PEFT's tensors of each layer by the letter, from names that end in `.lora_` and one of `parts`."""
    wrong = [key for key in UNSUPPORTED if config.get(key)]
    if wrong or config.get("bias", "none") != "none":
        raise ValueError(f"this LoRA uses {wrong or ['bias']}, which is not supported: plain A and B are")
    layers: dict[str, dict[str, Tensor]] = {}
    letters = ", ".join(part[0] for part in parts)
    for key, x in tensors.items():
        name, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if not name or part not in parts:
            raise ValueError(f"tensor {key} is none of {letters} of a linear layer's LoRA")
        layers.setdefault(name, {})[part[0]] = x
    for name, found in layers.items():
        if len(found) < len(parts):
            raise ValueError(f"{name} has only {', '.join(sorted(found))} of {letters}")
    return layers


def _from_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Adapter]:
    pairs = _parts(config, tensors, ("A.weight", "B.weight"))

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


def _adalora_from_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Adapter]:
    """The file holds the triplets that live; `rank_pattern` says which of the initial ranks they are."""
    missing = [theirs for theirs in ADALORA.values() if config.get(theirs) is None]
    if missing:
        raise ValueError(f"{CONFIG} of AdaLoRA has no {', '.join(missing)}")
    triplets = _parts(config, tensors, ("A", "B", "E"))
    settings = AdaLoraSettings(**{ours: config[theirs] for ours, theirs in ADALORA.items()})
    patterns, alive = config.get("rank_pattern") or {}, dict[str, Tensor]()
    for name, parts in triplets.items():
        mask = alive[name] = torch.tensor(patterns.get(f"{name}.lora_E", [True] * settings.initial), dtype=torch.bool)
        ranks = [len(parts["A"]), len(parts["B"].T), len(parts["E"])]
        if len(mask) != settings.initial or ranks != [int(mask.sum())] * 3:
            raise ValueError(
                f"{name}: {int(mask.sum())} of {len(mask)} ranks live, init_r is {settings.initial}, "
                f"and A, B, E hold {ranks}"
            )

    def adapter_of(name: str, inputs: int, outputs: int, weight: Tensor) -> Adapter:
        return AdaLora(inputs, outputs, settings, dtype=dtype or weight.dtype, device=weight.device)

    adapters = _attach_exactly(model, list(triplets), adapter_of)
    for name, adapter in adapters.items():
        whole, parts, mask = adapter.state_dict(), triplets[name], alive[name]
        for key, x in (("a", parts["A"]), ("b", parts["B"].T), ("e", parts["E"])):
            whole[key] = x.new_zeros(settings.initial, x.shape[1])
            whole[key][mask] = x
        _fill(adapter, {**whole, "alive": mask}, name)
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
