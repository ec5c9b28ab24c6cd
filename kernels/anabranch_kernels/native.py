"""The compiled extension, refused when it is missing or older than its sources."""

from pathlib import Path

import torch

from .source_hash import source_hash

try:
    from . import _C as extension
except ImportError as error:
    raise ImportError(f"the compiled kernels cannot be loaded ({error}); build them with `pip install .`") from error

if source_hash(Path(__file__).parents[2]) not in (None, extension.source_hash):
    raise ImportError("the compiled kernels are older than csrc/ or bindings/; rebuild them with `pip install -e .`")

# csrc/scalar.h, enum Type
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

# The fastest instruction set that this CPU has and the extension was compiled for; kernels take it as an argument.
ISA: str = extension.supported_isas()[-1]

__all__ = ["ISA", "TYPES", "extension"]
