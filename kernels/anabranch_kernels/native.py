"""The compiled extension, refused when it is missing or older than its sources."""

from pathlib import Path
from types import ModuleType

import torch

from .source_hash import source_hash

try:
    from . import _C as extension
except ImportError as error:
    raise ImportError(f"the compiled kernels cannot be loaded ({error}); build them with `pip install .`") from error

cuda_extension: ModuleType | None  # built only when asked for
try:
    from . import _cuda as cuda_extension
except ImportError:
    cuda_extension = None

_SOURCES = source_hash(Path(__file__).parents[2])
for _built in (extension, cuda_extension):
    if _built is not None and _SOURCES not in (None, _built.source_hash):
        raise ImportError(
            "the compiled kernels are older than csrc/ or bindings/; rebuild them with `pip install -e .`"
        )

# csrc/scalar.h, enum Type
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

# The fastest instruction set that this CPU has and the extension was compiled for; kernels take it as an argument.
ISA: str = extension.supported_isas()[-1]

__all__ = ["ISA", "TYPES", "cuda_extension", "extension"]
