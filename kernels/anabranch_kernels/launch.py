"""How Triton kernels are launched: what shapes and dtypes decide, as a value, and on which GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Compile-time constants, warps, pipeline stages; launchers make one, gpu_check compiles it.

    max_registers   of a thread; None leaves it to the compiler, which may spill a few to fit more programs side by side
    """

    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def on_its_device(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """Run a launcher with its first tensor's GPU as the current one, which is where Triton launches."""

    @wraps(launcher)
    def run(first: Tensor, *rest: Any) -> Result:
        with torch.cuda.device_of(first):
            return launcher(first, *rest)

    return run
