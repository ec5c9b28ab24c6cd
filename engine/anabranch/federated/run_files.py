"""A federation on disk, so that a run can stop at any moment and go on: at most one round is lost.

rounds.jsonl       a line for each round, written before its checkpoint
checkpoint.json    names the tensors that belong to it; replaced last
round-*.safetensors     the server's tensors and what clients keep
model.safetensors  of the last round, by the names of the network's tensors
result.json        when all rounds are done
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from anabranch.common.checkpoint import read_json, write_json, write_safetensors
from anabranch.common.files import replace_file
from anabranch.federated.rounds import Federation

LOG, POINTER, MODEL, RESULT = "rounds.jsonl", "checkpoint.json", "model.safetensors", "result.json"
SERVER, KEPT, WHOSE, SIZES = "server.", "kept.", "kept clients", "sizes."


def save(folder: Path, federation: Federation, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint and remove the one before."""
    put(folder, to_tensors(federation), federation.round, identity)


def restore(folder: Path, federation: Federation, identity: Mapping[str, Any]) -> None:
    """Bring a fresh federation to where a checkpoint left it. ValueError where that is another run's."""
    tensors, federation.round = get(folder, identity)
    from_tensors(tensors, federation)


def put(folder: Path, tensors: Mapping[str, Tensor], round: int, identity: Mapping[str, Any]) -> None:
    """What a run is before a round; the checkpoint before is removed. No two tensors may share memory."""
    name = f"round-{round:06d}.safetensors"
    write_safetensors(folder / name, tensors)
    write_json(folder / POINTER, {"tensors": name, "round": round, "identity": identity})
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


def get(folder: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors of a checkpoint, and the round that comes next. ValueError where it is another run's."""
    saved = read_json(folder / POINTER)
    if saved["identity"] != identity:
        before = saved["identity"]
        differing = [
            f"{name} is {identity.get(name)!r}, was {before.get(name)!r}"
            for name in sorted(identity.keys() | before.keys())
            if identity.get(name) != before.get(name)
        ]
        raise ValueError(f"a resumed run keeps what it is; in {folder} {'; '.join(differing)}")
    return load_file(folder / saved["tensors"]), saved["round"]


def to_tensors(federation: Federation) -> dict[str, Tensor]:
    """The server's tensors, and those of clients end to end: [sum of sizes, ...] with [m] sizes."""
    tensors = {SERVER + name: value.clone() for name, value in federation.server.items()}  # none may share memory
    clients = sorted(federation.kept)
    tensors[WHOSE] = torch.tensor(clients, dtype=torch.int64)
    for name in federation.kept[clients[0]] if clients else ():
        tensors[KEPT + name] = torch.cat([federation.kept[k][name].flatten() for k in clients])
        tensors[SIZES + name] = torch.tensor([federation.kept[k][name].shape for k in clients], dtype=torch.int64)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], federation: Federation) -> None:
    """The other way round."""
    federation.server = {name.removeprefix(SERVER): value for name, value in tensors.items() if name.startswith(SERVER)}
    clients = tensors[WHOSE].tolist()
    federation.kept = {k: {} for k in clients}
    for name, value in tensors.items():
        if not name.startswith(KEPT):
            continue
        shapes = tensors[SIZES + name.removeprefix(KEPT)]
        parts = value.split(shapes.prod(1).tolist())
        for k, part, shape in zip(clients, parts, shapes.tolist(), strict=True):
            federation.kept[k][name.removeprefix(KEPT)] = part.view(shape).clone()


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """A line of a log, on the disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path, rounds: int) -> list[dict[str, Any]]:
    """The lines of the first rounds; what came after them, perhaps half a line, is dropped from the file, too."""
    lines = path.read_text(encoding="utf-8").splitlines()[:rounds] if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    if [entry["round"] for entry in entries] != list(range(rounds)):
        raise ValueError(f"{path} does not have a line for each of the {rounds} rounds that its checkpoint has")
    text = "".join(line + "\n" for line in lines)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return entries


def save_model(path: Path, federation: Federation) -> None:
    """The networks as tensors by name; those of further networks begin with their number."""
    named = federation.network.layout.named(federation.server["model"])
    write_safetensors(path, {name: value.clone() for name, value in named.items()})


def enter(folder: Path, *, resume: bool) -> Sequence[str]:
    """Make a run's folder; what it already holds of a run. ValueError if it holds one that is not to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    held = [name for name in (POINTER, LOG, RESULT) if (folder / name).exists()]
    if held and not resume:
        raise ValueError(f"{folder} already holds a run; go on with --resume or choose another folder")
    return held
