"""Text files as one stream of bytes for training and another, of other files, to measure on.

A token is a byte. Two more mark where a file begins and ends: BOS, the file's bytes, EOS, then the next file.
A batch is a function of (seed, step) alone, so a run continues exactly where it stopped with nothing to restore.
"""

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
        if not (skipped.intersection(folders) or build or generated) and _is_text(path.read_bytes()):
            found.append(path)
    return found


def find_files(sources: Iterable[str]) -> list[Path]:
    """Files named by paths, folders (every text file below them that is not hidden) or glob patterns with `**`.

    A name that leads to nothing and a named file that is not UTF-8 text are ValueErrors.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_file():
            found.append(_checked(path))
        elif path.is_dir():
            found += _below(path)
        else:
            matches = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
            if not matches:
                raise ValueError(f"no such file or folder, and no match as a pattern: {source!r}")
            found += [_checked(match) for match in matches if match.is_file()]
    return list(dict.fromkeys(path.resolve() for path in found))


def read_corpus(paths: Sequence[Path], *, held_out: float = 0.05) -> Corpus:
    """Read files and hold a share of their bytes out, whole files at a time; a single file is cut near its end.

    Which files are held out depends on their contents alone, and equal files count once, so no held-out file is
    also trained on. ValueError when there is no text or the share is not inside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}")
    by_hash = {hashlib.sha256(content).hexdigest(): content for content in map(Path.read_bytes, paths) if content}
    contents = [by_hash[key] for key in sorted(by_hash)]
    if not contents:
        raise ValueError(f"the corpus is empty: no text in the {len(paths)} files given")
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    train, held = _split(contents, held_out)
    return Corpus(
        train=_stream(train),
        held_out=_stream(held),
        files=len(contents),
        held_out_files=len(held) if len(contents) > 1 else 0,
        bytes_total=sum(map(len, contents)),
        sha256=digest.hexdigest(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Seeded batches over a stream: every epoch visits each window of `context` tokens once, in a new order.

    The windows of an epoch share a random phase, so that file positions do not stick to window positions.
    """

    stream: Tensor
    context: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(
                f"the text is shorter than the context: {self.stream.numel()} tokens to train on, "
                f"and a context of {self.context} needs at least {2 * self.context + 1}"
            )

    @property
    def windows(self) -> int:
        """Windows per epoch, the same for every phase."""
        return (self.stream.numel() - 1 - self.context) // self.context

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [batch, context] int64 of one step, counted from 0; targets are one token later."""
        places = [divmod(step * self.batch + row, self.windows) for row in range(self.batch)]
        starts = {epoch: self._starts(epoch) for epoch in {epoch for epoch, _ in places}}
        first = [int(starts[epoch][place]) for epoch, place in places]
        window = torch.stack([self.stream[start : start + self.context + 1] for start in first]).long()
        return window[:, :-1], window[:, 1:]

    def _starts(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        phase = torch.randint(self.context, (1,), generator=generator)
        return torch.randperm(self.windows, generator=generator) * self.context + phase


def held_out_windows(stream: Tensor, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets [n, context] int64 that predict each token of a stream once, except the first.

    The last, incomplete window is filled with targets of -100, which cross_entropy ignores. `limit` keeps that many
    windows, spread evenly over the stream.
    """
    n = -(-(stream.numel() - 1) // context)
    if n < 1:
        raise ValueError(f"nothing to measure on: the held-out text has {stream.numel()} tokens")
    padded = torch.full((n * context + 1,), -100, dtype=torch.int64)
    padded[: stream.numel()] = stream
    inputs, targets = padded[:-1].view(n, context), padded[1:].view(n, context)
    chosen = torch.arange(n) if limit is None or limit >= n else torch.arange(limit) * n // limit
    return inputs[chosen].clamp(min=0), targets[chosen]


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _checked(path: Path) -> Path:
    if not _is_text(path.read_bytes()):
        raise ValueError(f"not a text file (UTF-8 without NUL bytes): {path}")
    return path


def _below(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in seen if _is_text(path.read_bytes())]


def _split(contents: list[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """Training and held-out contents, whole files that fit into the share; the smallest file if none fits."""
    if len(contents) == 1:
        text = contents[0]
        cut = len(text) - max(1, int(share * len(text)))
        if cut < 1:
            raise ValueError("the corpus is one byte, which cannot be both trained on and held out")
        return [text[:cut]], [text[cut:]]
    room = share * sum(map(len, contents))
    train, held = [], []
    for content in contents:
        if len(content) <= room:
            held.append(content)
            room -= len(content)
        else:
            train.append(content)
    if not held:
        smallest = min(train, key=len)
        train.remove(smallest)
        held.append(smallest)
    return train, held


def _stream(contents: list[bytes]) -> Tensor:
    parts = []
    for content in contents:
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(torch.int16)
        parts += [torch.tensor([BOS], dtype=torch.int16), text, torch.tensor([EOS], dtype=torch.int16)]
    return torch.cat(parts)
