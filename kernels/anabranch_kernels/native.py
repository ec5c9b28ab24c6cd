"""The compiled extension, refused when it is missing or older than its sources."""

import hashlib
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[2]

try:
    from . import _C as extension
except ImportError as error:
    raise ImportError(f"the compiled kernels cannot be loaded ({error}); build them with `pip install .`") from error


def _source_hash() -> str | None:
    """Hash of the sources beside this package, as setup.py makes it; None for an installed package without sources."""
    csrc, bindings = _ROOT / "csrc", _ROOT / "bindings"
    if not (_ROOT / "setup.py").exists() or not csrc.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*csrc.glob("*.h"), *csrc.glob("*.cpp"), *bindings.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


if _source_hash() not in (None, extension.source_hash):
    raise ImportError("the compiled kernels are older than csrc/ or bindings/; rebuild them with `pip install -e .`")

# csrc/scalar.h, enum Type
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

# The fastest instruction set that this CPU has and the extension was compiled for; kernels take it as an argument.
ISA: str = extension.supported_isas()[-1]

__all__ = ["ISA", "TYPES", "extension"]
