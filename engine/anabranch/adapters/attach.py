"""Adapters put beside the linear layers of a model, whose own weights no longer train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from anabranch.adapters.rank_lora import RankLora
from anabranch.adapters.triadapt import TriAdapt

Adapter = RankLora | TriAdapt
Branch = Callable[[str, int, int], Adapter]  # name, inputs, outputs of a linear layer -> module on its input


class Adapted(nn.Module):
    """A linear layer and what an adapter adds to it."""

    adapter: Adapter

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        self.tokens: Tensor | None = None  # of the batch that runs: 0 takes part, -1 is padding

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.adapter(x, self.tokens)
        return out


def attach(model: nn.Module, branch: Branch, *, targets: Sequence[str] = ("*",)) -> dict[str, Adapted]:
    """Put an adapter beside every linear layer that matches, in place; all other weights stop training.

    branch   makes the adapter of a layer from its name and sizes
    targets  names or ends of names of layers, with * and ?: "q_proj", "blocks.*.qkv"; "*" means every linear layer but
             the output head (`lm_head`)
    returns  name -> the layer with its adapter, in the model's order

    A linear layer is a module whose `weight` is [out, in]: torch's, those of transformers and of this package. Raises
    ValueError when a pattern matches none, and for a model that has adapters already.
    """
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("the model has adapters already; detach them first")
    found = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen = {name: module for name, module in found.items() if any(_matches(name, target) for target in targets)}
    unmatched = [target for target in targets if not any(_matches(name, target) for name in found)]
    if unmatched or not chosen:
        raise ValueError(f"no linear layer matches {unmatched or list(targets)}; there are {sorted(found)[:20]}")
    adapted = {}
    for name, module in chosen.items():
        outputs, inputs = module.get_parameter("weight").shape
        adapted[name] = Adapted(module, branch(name, inputs, outputs))
    model.requires_grad_(False)
    for name, layer in adapted.items():
        _replace(model, name, layer)
    return adapted


def detach(model: nn.Module) -> None:
    """Take the adapters away again; the layers are the ones there were before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            _replace(model, name, module.base)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter into its layer's weight and take it away.

    Raises ValueError, before anything changes, if one of them depends on the token (`delta` says so).
    """
    deltas: dict[str, Tensor] = {
        name: module.adapter.delta() for name, module in model.named_modules() if isinstance(module, Adapted)
    }
    for name, delta in deltas.items():
        weight = model.get_parameter(f"{name}.base.weight")
        weight.add_(delta.to(weight.dtype))
    detach(model)


@contextmanager
def padded(adapted: dict[str, Adapted], mask: Tensor) -> Iterator[None]:
    """While open, tokens where mask [...] bool is False take no part in adapters: nothing is added, none counted."""
    tokens = (mask.reshape(-1).int() - 1).to(torch.int32)
    for layer in adapted.values():
        layer.tokens = tokens
    try:
        yield
    finally:
        for layer in adapted.values():
            layer.tokens = None


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and "Linear" in type(module).__name__


def _matches(name: str, target: str) -> bool:
    if target == "*":
        return name.rpartition(".")[2] != "lm_head"
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
