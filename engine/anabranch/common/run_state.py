"""Checkpoints of a run: one safetensors file of weights, buffers and AdamW moments, and a JSON file that names it.

The tensors are written first and the JSON replaced last, so whenever the machine stops, the JSON names a whole file.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from anabranch.common.checkpoint import read_json, write_json, write_safetensors

FOLDER, POINTER = "checkpoint", "checkpoint.json"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; everything that is not a tensor.

    loss_sum, loss_count   bits per token summed over the steps since the last log entry
    shown      last logged values
    schedules  [[first step, steps], ...]: the lengths of the schedule this run has followed
    """

    corpus: str
    recipe: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    shown: dict[str, float] = field(default_factory=dict)
    schedules: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.schedules:
            self.schedules = [[0, self.recipe["steps"]]]


def exists(out: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return (out / FOLDER / POINTER).is_file()


def save(out: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint and remove the one before."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{progress.step:08d}.safetensors"
    tensors = {f"weight.{key}": x for key, x in model.state_dict().items()}
    for key, parameter in model.named_parameters():
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{moment}.{key}"] = value
    write_safetensors(folder / name, tensors)
    write_json(folder / POINTER, {"tensors": name, **asdict(progress)})
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def restore(out: Path, model: nn.Module, optimiser: torch.optim.Optimizer, fresh: Progress) -> Progress:
    """Load a checkpoint into a model and its optimiser; `fresh` says which run it must belong to.

    Only `steps` of the recipe may differ. ValueError when there is no checkpoint or it is another run's.
    """
    folder = out / FOLDER
    if not exists(out):
        raise ValueError(f"nothing to resume: no {folder / POINTER}")
    saved = read_json(folder / POINTER)
    tensors = load_file(folder / saved.pop("tensors"))
    progress = Progress(**saved)
    _check_same_run(progress, fresh)
    model.load_state_dict({key: tensors[f"weight.{key}"] for key in model.state_dict()})
    for key, parameter in model.named_parameters():
        ending = f".{key}"
        moments = {name.removesuffix(ending): x for name, x in tensors.items() if name.endswith(ending)}
        optimiser.state[parameter] = {
            name: x if name == "step" else x.to(parameter.device)
            for name, x in moments.items()
            if name in ("step", "exp_avg", "exp_avg_sq")
        }
    if progress.recipe["steps"] != fresh.recipe["steps"]:
        progress.schedules.append([progress.step, fresh.recipe["steps"]])
        progress.recipe = fresh.recipe
    return progress


def cut_log(path: Path, step: int) -> None:
    """Drop the entries a run wrote after its last checkpoint: it is about to write them again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def _check_same_run(saved: Progress, fresh: Progress) -> None:
    if saved.corpus != fresh.corpus:
        raise ValueError(f"the text has changed since the checkpoint: sha256 {fresh.corpus}, before {saved.corpus}")
    differing = [
        f"{name} is {fresh.recipe.get(name)!r}, was {saved.recipe.get(name)!r}"
        for name in sorted(fresh.recipe.keys() | saved.recipe.keys())
        if name != "steps" and fresh.recipe.get(name) != saved.recipe.get(name)
    ]
    if differing:
        raise ValueError(f"a resumed run keeps its settings, except steps; {'; '.join(differing)}")
