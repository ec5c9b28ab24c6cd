"""The pieces of a transformer block that hold no attention."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch_kernels.skinny_linear.op import skinny_linear


class Linear(nn.Module):
    """y = x weight^T + bias, with the weight [out, in] left uninitialised until a checkpoint or training fills it."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        empty = partial(torch.empty, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(empty(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; the inference kernel whenever no gradient can be asked for."""
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return skinny_linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate | up]: the gated unit of Llama's feed-forward and of AugQ."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
