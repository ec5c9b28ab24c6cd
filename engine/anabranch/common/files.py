"""Files that are either whole or not there, whenever the machine stops."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def check_targets(paths: Iterable[Path]) -> None:
    """Say beforehand that a file cannot be written: ValueError where its folder is missing."""
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a name must not reach the disk before the bytes it stands for
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
