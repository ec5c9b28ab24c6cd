"""What the ops ask of tensors before a kernel sees them."""

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """x if the elements of a row lie side by side, else a copy in which they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """In float64, or float32 where the device has none (Apple's GPUs)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Of what kernels add up: float64 for float64, float32 for the shorter ones."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def described(x: Tensor) -> str:
    """Shape, dtype and device, for errors."""
    return f"{list(x.shape)} {x.dtype} on {x.device}"
