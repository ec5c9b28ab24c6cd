"""Linear layer for few rows: on a CPU the weight's bytes are the whole cost, so they are read once, at full speed."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..library import define
from . import cpu, reference

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_op = define(
    "skinny_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scales) -> Tensor",
    reference=reference.skinny_linear,
    cpu=cpu.skinny_linear,
    cuda=lambda x, weight, bias, scales: _by_torch(x, weight, bias, scales),
    fake=lambda x, weight, bias, scales: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scales: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for inference; no gradient.

    x        [..., in]   float32, float16 or bfloat16
    weight   [out, in]   the dtype of x, or int8 with `scales`
    bias     [out]       dtype of x, or None
    scales   [out]       float32, one for each row of an int8 weight: value = int8 * scale
    returns  [..., out]  dtype of x; sums are kept in float32

    On CPUs with AMX an int8 weight meets x as whole numbers: of each x at most 2^-30 of the largest in its row is lost,
    and a row with infinity or NaN gives NaN.

    Raises ValueError for shapes or dtypes that do not fit. Matrices that share an input (q, k, v; gate, up) are one
    call when their weights are stored as one.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., in] and weight [out, in], got {list(x.shape)} and {list(weight.shape)}")
    if x.dtype not in WEIGHT_DTYPES or weight.dtype not in (x.dtype, torch.int8):
        raise ValueError(
            f"x must be float32, float16 or bfloat16 and weight the same or int8, got {x.dtype} and {weight.dtype}"
        )
    if (scales is not None) != (weight.dtype == torch.int8):
        raise ValueError(f"scales goes with an int8 weight and only with it, got weight {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"all tensors must be on x's device {x.device}, got weight on {weight.device}")
    if bias is not None:
        _check_vector(bias, "bias", weight, x.dtype)
    if scales is not None:
        _check_vector(scales, "scales", weight, torch.float32)
    out: Tensor = _op(x, weight, bias, scales)
    return out


def _check_vector(vector: Tensor, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    if vector.shape != weight.shape[:1] or vector.dtype != dtype:
        raise ValueError(f"{name} must be [{weight.shape[0]}] {dtype}, got {list(vector.shape)} {vector.dtype}")
    if vector.device != weight.device:
        raise ValueError(f"all tensors must be on x's device {weight.device}, got {name} on {vector.device}")


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    if scales is not None:
        weight = (weight * scales[:, None]).to(x.dtype)
    return linear(x, weight, bias)
