"""Adapters on disk: plain LoRA and AdaLoRA as PEFT's own folders, others as safetensors beside a JSON of settings.

Both hold `adapter_config.json` and `adapter_model.safetensors`, with PEFT's names of tensors where PEFT has the method,
so that either library loads what the other saved.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings
from anabranch.adapters.attach import Adapter, Place, bare_layers, put
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import TriAdapt, TriAdaptSettings
from anabranch.common.checkpoint import open_safetensors, read_json, write_json, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1 << 20
PEFT_PREFIX = "base_model.model."
METHODS: dict[str, tuple[Any, Any]] = {
    "rank_lora": (RankLora, RankLoraSettings), "triadapt": (TriAdapt, TriAdaptSettings),
}  # fmt: skip
PEFT = {
    "task_type": None, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True,
}  # fmt: skip
# Endings of the tensors in PEFT's own formats.
PEFTS = {"lora": ("A.weight", "B.weight"), "adalora": ("A", "B", "E")}
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


class _Layer(NamedTuple):
    """One layer's adapter in a file.

    keys   its tensors, by their keys in a state dict -> their names in the file
    alive  [r0] bool, which of AdaLoRA's ranks the file holds
    """

    kind: Any
    settings: Any
    keys: dict[str, str]
    alive: Tensor | None = None


def load_adapters(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None) -> dict[str, Adapter]:
    """Attach the adapters of a folder to a model; returns them as `attach` does.

    dtype   of their weights; that of each layer's own if None

    Raises ValueError as `read_adapters` does, and for a model that has adapters already; nothing has changed then.
    """
    places = bare_layers(model)
    adapters = read_adapters(places, folder, dtype=dtype)
    put(model, places, adapters)
    return adapters


def read_adapters(
    places: Mapping[str, Place],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    most_bytes: int | None = None,
) -> dict[str, Adapter]:
    """The adapters of a folder for a model's linear layers (`linear_layers`), beside which they are not put.

    dtype, device  of their weights; those of each layer's own if None
    most_bytes     of the file that holds them, if its author is not trusted
    returns        name -> adapter, in the model's order

    Raises ValueError for a folder that is none, methods and options that are not computed here, layers that the model
    does not have and tensors of other sizes, all before a tensor is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no adapter folder at {folder}; it would hold {CONFIG} and {WEIGHTS}")
    for name, most in ((CONFIG, MOST_CONFIG_BYTES), (WEIGHTS, most_bytes)):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; an adapter's folder holds {CONFIG} and {WEIGHTS}")
        if most is not None and (size := (folder / name).stat().st_size) > most:
            raise ValueError(f"{folder / name} has {size} bytes, allowed {most}")
    config = read_json(folder / CONFIG)
    file = open_safetensors(folder / WEIGHTS)
    shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    method = str(config.get("peft_type", "")).lower()
    if method not in (*PEFTS, *METHODS):
        known = ", ".join(map(str.upper, (*PEFTS, *METHODS)))
        raise ValueError(f"{folder / CONFIG}: peft_type must be {known}, got {method!r}")
    try:
        layers = _peft_layers(method, config, shapes) if method in PEFTS else _own_layers(method, config, shapes)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG} lacks what {method} needs, or has it in another form: {error!r}"
        ) from error
    unknown = [name for name in layers if name not in places]
    if unknown or not layers:
        raise ValueError(f"{folder} adapts {unknown[:3]}; the model has {sorted(places)[:20]}")
    for name, layer in layers.items():
        _check_sizes(name, layer, places[name], shapes)
    return {name: _read(file, layers[name], place, dtype, device) for name, place in places.items() if name in layers}


def _own_layers(method: str, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, _Layer]:
    kind, settings_of = METHODS[method]
    settings = settings_of(**config["settings"])
    layers = {name: _Layer(kind, settings, {}) for name in config["target_modules"]}
    for key in shapes:
        name, _, part = key.rpartition(".")
        if name not in layers:
            raise ValueError(f"tensor {key} belongs to none of the target_modules {list(layers)[:3]}")
        layers[name].keys[part] = key
    return layers


def _peft_layers(method: str, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, _Layer]:
    wrong = [key for key in UNSUPPORTED if config.get(key)]
    if wrong or config.get("bias", "none") != "none":
        raise ValueError(f"this LoRA uses {wrong or ['bias']}, which is not supported: plain A and B are")
    parts = PEFTS[method]
    letters, found = ", ".join(part[0] for part in parts), dict[str, dict[str, str]]()
    for key, shape in shapes.items():
        name, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if not name or part not in parts or len(shape) != 2:
            raise ValueError(f"tensor {key} {shape} is none of {letters} of a linear layer's LoRA")
        found.setdefault(name, {})[part[0].lower()] = key
    for name, keys in found.items():
        if len(keys) < len(parts):
            raise ValueError(f"{name} has only {', '.join(sorted(keys)).upper()} of {letters}")
    if method == "adalora":
        return _adalora_layers(config, found)
    layers = {}
    for name, keys in found.items():
        r = shapes[keys["a"]][0]
        alpha = _pattern(config.get("alpha_pattern"), name, float(config["lora_alpha"]))
        settings = RankLoraSettings(ranks=r, alpha=alpha * r**0.5 if config.get("use_rslora") else alpha)
        layers[name] = _Layer(RankLora, settings, keys)
    return layers


def _adalora_layers(config: Mapping[str, Any], found: Mapping[str, dict[str, str]]) -> dict[str, _Layer]:
    """The file holds the triplets that live; `rank_pattern` says which of the initial ranks they are."""
    missing = [theirs for theirs in ADALORA.values() if config.get(theirs) is None]
    if missing:
        raise ValueError(f"{CONFIG} of AdaLoRA has no {', '.join(missing)}")
    settings = AdaLoraSettings(**{ours: config[theirs] for ours, theirs in ADALORA.items()})
    patterns, layers = config.get("rank_pattern") or {}, {}
    for name, keys in found.items():
        alive = torch.tensor(patterns.get(f"{name}.lora_E", [True] * settings.initial), dtype=torch.bool)
        if len(alive) != settings.initial:
            raise ValueError(f"{name}: rank_pattern is of {len(alive)} ranks, init_r is {settings.initial}")
        layers[name] = _Layer(AdaLora, settings, keys, alive)
    return layers


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


def _pattern(patterns: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    """PEFT's patterns of layers: the whole name or its end."""
    for end, value in (patterns or {}).items():
        if name == end or name.endswith(f".{end}"):
            return float(value)
    return otherwise


def _is_pefts(layer: _Layer) -> bool:
    """PEFT stores B as [outputs, r], and neither a router nor what only training needs."""
    return ".lora_B" in layer.keys.get("b", "")


def _check_sizes(name: str, layer: _Layer, place: Place, shapes: Mapping[str, list[int]]) -> None:
    outputs, inputs = place.weight.shape
    wanted = layer.kind.shapes(inputs, outputs, layer.settings)
    found = {key: shapes[stored] for key, stored in layer.keys.items()}
    if _is_pefts(layer):
        found["b"] = found["b"][::-1]
        ranks = wanted["a"][0] if layer.alive is None else int(layer.alive.sum())
        wanted = {key: [ranks, wanted[key][1]] for key in found}
    if wanted != found:
        raise ValueError(f"{name} needs tensors {wanted}, the file has {found}")


def _read(
    file: Any, layer: _Layer, place: Place, dtype: torch.dtype | None, device: torch.device | str | None
) -> Adapter:
    weight = place.weight
    outputs, inputs = weight.shape
    adapter: Adapter = layer.kind(
        inputs, outputs, layer.settings, dtype=dtype or weight.dtype, device=device or weight.device
    )
    tensors: dict[str, Tensor] = {key: file.get_tensor(stored) for key, stored in layer.keys.items()}
    if _is_pefts(layer):
        tensors["b"] = tensors["b"].T
    if layer.alive is not None:
        for key, living in tensors.items():
            tensors[key] = living.new_zeros(len(layer.alive), living.shape[1])
            tensors[key][layer.alive] = living
        tensors["alive"] = layer.alive
    adapter.load_state_dict({**adapter.state_dict(), **tensors})
    return adapter
