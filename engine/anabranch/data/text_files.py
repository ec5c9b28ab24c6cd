"""Text files: found by name, folder or pattern, read once each, and split into a part to train on and one held out."""

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path


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


def read_distinct(paths: Sequence[Path]) -> tuple[list[bytes], str]:
    """Contents of files, each once, in the order of their hashes; and the sha256 of all in that order.

    The hash names the text whatever the files are called. ValueError when there is no text.
    """
    by_hash = {hashlib.sha256(content).hexdigest(): content for content in map(Path.read_bytes, paths) if content}
    contents = [by_hash[key] for key in sorted(by_hash)]
    if not contents:
        raise ValueError(f"the corpus is empty: no text in the {len(paths)} files given")
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return contents, digest.hexdigest()


def split_texts(contents: list[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """Training and held-out contents: whole files that fit into the share of the bytes, the smallest if none fits.

    A single file is cut near its end. The order decides what is held out; `read_distinct` makes it one of contents.
    ValueError when the share is not inside (0, 1) or there is nothing to cut.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {share}")
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


def is_text(content: bytes) -> bool:
    """Whether bytes are UTF-8 without NUL."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _checked(path: Path) -> Path:
    if not is_text(path.read_bytes()):
        raise ValueError(f"not a text file (UTF-8 without NUL bytes): {path}")
    return path


def _below(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in seen if is_text(path.read_bytes())]
