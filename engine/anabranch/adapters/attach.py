"""Adapters put beside the linear layers of a model, whose own weights no longer train."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anabranch.adapters.adalora import AdaLora
from anabranch.adapters.rank_lora import RankLora
from anabranch.adapters.triadapt import TriAdapt
from anabranch.models.transformer import Transformer
from anabranch.models.weights import projections

Adapter = RankLora | TriAdapt | AdaLora
Branch = Callable[[str, int, int], Adapter]  # name, inputs, outputs of a linear layer -> module on its input


class Place(NamedTuple):
    """A linear layer: a module of the model, and which of its outputs if it computes several layers' at once.

    weight   [outputs, inputs] of the layer alone
    """

    module: str
    columns: slice | None
    weight: Tensor


class Adapted(nn.Module):
    """A module that computes one linear layer, or several fused ones, and what adapters add to each."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()
        self.columns: list[slice | None] = []
        self.tokens: Tensor | None = None  # of the batch that runs: 0 takes part, -1 is padding

    def add(self, adapter: Adapter, columns: slice | None) -> None:
        self.adapters.append(adapter)
        self.columns.append(columns)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        for adapter, columns in zip(self.adapters, self.columns, strict=True):
            branch = adapter(x, self.tokens)
            if columns is not None:
                branch = nn.functional.pad(branch, (columns.start, out.shape[-1] - columns.stop))
            out = out + branch
        return out


def attach(model: nn.Module, branch: Branch, *, targets: Sequence[str] = ("*",)) -> dict[str, Adapter]:
    """Put an adapter beside every linear layer that matches, in place; all other weights stop training.

    branch   makes the adapter of a layer from its name and sizes
    targets  names or ends of names of layers, with * and ?: "q_proj", "layers.1.*"; "*" means every linear layer but
             the output head (`lm_head`)
    returns  name -> adapter, in the model's order

    A linear layer is a module whose `weight` is [out, in]: torch's and those of transformers. This package's models
    fuse layers; theirs have the names under which checkpoints publish them (`model.layers.0.self_attn.q_proj`). Raises
    ValueError when a pattern matches none, and for a model that has adapters already; nothing has changed then.
    """
    places = bare_layers(model)
    unmatched = [target for target in targets if not any(_matches(name, target) for name in places)]
    if unmatched or not targets:
        raise ValueError(f"no linear layer matches {unmatched}; there are {sorted(places)[:20]}")
    adapters = {}
    for name, place in places.items():
        if any(_matches(name, target) for target in targets):
            outputs, inputs = place.weight.shape
            adapters[name] = branch(name, inputs, outputs)
    put(model, places, adapters)
    return adapters


def put(model: nn.Module, places: Mapping[str, Place], adapters: Mapping[str, Adapter]) -> None:
    """Put adapters beside the layers of their names, in place; all other weights stop training."""
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        place = places[name]
        layer = model.get_submodule(place.module)
        if not isinstance(layer, Adapted):
            layer = Adapted(layer)
            replace_module(model, place.module, layer)
        layer.add(adapter, place.columns)


def bare_layers(model: nn.Module) -> dict[str, Place]:
    """All linear layers by name; ValueError for a model that has adapters already."""
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("the model has adapters already; detach them first")
    return linear_layers(model)


def linear_layers(model: nn.Module) -> dict[str, Place]:
    """All linear layers by name."""
    if isinstance(model, Transformer):
        fused = projections(model).items()
        return {name: Place(path, rows, model.get_parameter(f"{path}.weight")[rows]) for name, (path, rows) in fused}
    layers = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    return {name: Place(name, None, module.get_parameter("weight")) for name, module in layers}


def detach(model: nn.Module) -> None:
    """Take the adapters away again; the layers are the ones there were before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            replace_module(model, name, module.base)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter into its layer's weight and take it away.

    Raises ValueError, before anything changes, if one of them depends on the token (`delta` says so).
    """
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    deltas = [[adapter.delta() for adapter in layer.adapters] for layer in layers]  # type: ignore[operator]
    for layer, some in zip(layers, deltas, strict=True):
        weight = layer.base.get_parameter("weight")
        for delta, columns in zip(some, layer.columns, strict=True):
            part = weight if columns is None else weight[columns]
            part.add_(delta.to(weight.dtype))
    detach(model)


@contextmanager
def padded(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """While open, tokens where mask [...] bool is False take no part in adapters: nothing is added, none counted."""
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    tokens = mask.reshape(-1).to(torch.int32) - 1
    for layer in layers:
        layer.tokens = tokens
    try:
        yield
    finally:
        for layer in layers:
            layer.tokens = None


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and "Linear" in type(module).__name__


def _matches(name: str, target: str) -> bool:
    if target == "*":
        return name.rpartition(".")[2] != "lm_head"
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
