"""The fingerprint that ties a compiled extension to its sources; setup.py runs this file too."""

import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cpp", ".cu")


def source_hash(root: Path) -> str | None:
    """Hash of the C++ sources of the repository at `root`; None where there are none, as in an installed package."""
    if not (root / "setup.py").exists():
        return None
    csrc, bindings = root / "csrc", root / "bindings"
    digest = hashlib.sha256()
    sources = [path for folder in (csrc, bindings) for path in folder.rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
