"""x @ weight.T + bias in float64."""

import torch
from torch import Tensor


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    weights = weight.to(wide) if scales is None else weight.to(wide) * scales.to(wide)[:, None]
    out = x.to(wide) @ weights.T
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
