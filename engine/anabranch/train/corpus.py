"""Text files as one stream of bytes for training and another, of other files, to measure on.

A token is a byte. Two more mark where a file begins and ends: BOS, the file's bytes, EOS, then the next file.
"""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anabranch.data.text_files import is_text, read_distinct, split_texts

BOS, EOS = 256, 257
VOCAB_SIZE = 258

# Parts of the standard library that are not library code: tests, caches, other people's packages, build products.
_FOREIGN_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Tables that programs wrote: code pages, character names, documentation topics.
_GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})
_GENERATED_FILES = frozenset({"entities.py", "stringprep.py"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Two token streams of different files.

    train, held_out    [n] uint16-range ids in int16; BOS + bytes + EOS per file
    files, bytes_total counted over distinct files; sha256 is over their contents in the order of their hashes,
                       so it names the text whatever the files were called
    held_out_files     how many of the files are held out; 0 when one file was cut in two
    """

    train: Tensor
    held_out: Tensor
    files: int
    held_out_files: int
    bytes_total: int
    sha256: str


def standard_library() -> list[Path]:
    """Python sources of the running interpreter's standard library, without tests, packages and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _FOREIGN_FOLDERS | _GENERATED_FOLDERS
    found = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        build = any(part.startswith(("config-", "lib-dynload")) for part in folders)
        generated = path.name in _GENERATED_FILES or path.name.startswith("_sysconfigdata")
        if not (skipped.intersection(folders) or build or generated) and is_text(path.read_bytes()):
            found.append(path)
    return found


def read_corpus(paths: Sequence[Path], *, held_out: float = 0.05) -> Corpus:
    """Read files and hold a share of their bytes out, whole files at a time; a single file is cut near its end.

    Which files are held out depends on their contents alone, and equal files count once, so no held-out file is
    also trained on. ValueError when there is no text or the share is not inside (0, 1).
    """
    contents, sha256 = read_distinct(paths)
    train, held = split_texts(contents, held_out)
    return Corpus(
        train=_stream(train),
        held_out=_stream(held),
        files=len(contents),
        held_out_files=len(held) if len(contents) > 1 else 0,
        bytes_total=sum(map(len, contents)),
        sha256=sha256,
    )


def _stream(contents: list[bytes]) -> Tensor:
    parts = []
    for content in contents:
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(torch.int16)
        parts += [torch.tensor([BOS], dtype=torch.int16), text, torch.tensor([EOS], dtype=torch.int16)]
    return torch.cat(parts)
