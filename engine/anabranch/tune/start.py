"""Adapters that begin where those of a folder ended."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from anabranch.adapters.attach import Adapter, Branch, attach, detach
from anabranch.adapters.files import load_adapters
from anabranch.models.transformer import Transformer

# Settings of adapters that say how they are trained, not what they compute.
OF_TRAINING = frozenset(
    {"balance", "steps", "warmup", "final", "interval", "model", "most", "norm", "beta1", "beta2", "orthogonality"}
)


def attach_from(folder: Path, model: Transformer, branch: Branch, targets: Sequence[str]) -> dict[str, Adapter]:
    """Attach as `attach` does, and fill the adapters with what a folder holds.

    Raises ValueError, with both settings, where the folder's are not of the kind, layers and sizes that are asked for.
    """
    found = load_adapters(model, folder, dtype=torch.float32)
    detach(model)
    adapters = attach(model, branch, targets=targets)
    if found.keys() != adapters.keys():
        odd = sorted(found.keys() ^ adapters.keys())
        raise ValueError(f"{folder} adapts other layers than the targets name: {len(odd)} differ, such as {odd[:3]}")
    for name, adapter in adapters.items():
        theirs, ours = _computed(found[name]), _computed(adapter)
        if theirs != ours:
            differing = [
                f"{key} is {ours.get(key)!r}, the folder has {theirs.get(key)!r}"
                for key in sorted(theirs.keys() | ours.keys())
                if theirs.get(key) != ours.get(key)
            ]
            raise ValueError(f"{folder} holds other adapters than this run would train; {'; '.join(differing)}")
        adapter.load_state_dict(found[name].state_dict())
    return adapters


def _computed(adapter: Adapter) -> Mapping[str, object]:
    settings = {key: value for key, value in asdict(adapter.settings).items() if key not in OF_TRAINING}
    return {"kind": type(adapter).__name__, **settings}
