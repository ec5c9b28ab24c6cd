"""How a Triton kernel is launched, as a value: what shapes and dtypes decide, before any tensor is at hand."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Compile-time constants, warps, pipeline stages; launchers make one, gpu_check compiles it.

    max_registers   of a thread; None leaves it to the compiler, which may spill a few to fit more programs side by side
    """

    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
