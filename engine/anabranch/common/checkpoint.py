"""Checkpoint folders as Hugging Face lays them out: `config.json` beside safetensors, in one file or in shards.

Nothing is unpickled: a pickle runs code of its author's choice when it is opened.
"""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anabranch.common.files import replace_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a model folder holds beside its weights and its config.json.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "tekken.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


class Checkpoint:
    """The tensors of a folder by name. They are mapped from disk and read one at a time, never all at once.

    shapes    name -> shape of every tensor
    dtypes    name -> its safetensors name of dtype, such as "BF16"
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, str] = {}
        for path in weight_files(self.folder):
            file = open_safetensors(path)
            for name in file.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                part = file.get_slice(name)
                self._files[name], self.shapes[name], self.dtypes[name] = file, part.get_shape(), part.get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint folder."""
    if not path.parent.is_dir():
        raise ValueError(f"no model folder at {path.parent}; give a local folder with config.json and safetensors")
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; a model folder holds config.json and safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there, whenever the machine stops."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one safetensors file that is either whole or not there, whenever the machine stops."""
    owned = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(owned, temporary, metadata={"format": "pt"}))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a model folder holds beside its weights and its config.json: tokenizer, chat template, licence."""
    files = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for path in sorted(files):
        replace_file(folder / path.name, partial(shutil.copyfile, path))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one file or the shards of an index."""
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}; give a local folder with config.json and safetensors")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise ValueError(f"{folder / INDEX} names shards outside its folder: {outside}")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{folder / INDEX} names shards that are not there: {missing}")
        return [folder / shard for shard in shards]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as pickles ({', '.join(pickles)}), which run code when opened; "
            "only safetensors are loaded: convert them with transformers' save_pretrained"
        )
    raise ValueError(f"{folder} has no weights; expected {SINGLE} or {INDEX} with its shards")


def open_safetensors(path: Path) -> Any:
    """A safetensors file, mapped; its header is checked against the file's size."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; it is cut short or not a safetensors file") from error
