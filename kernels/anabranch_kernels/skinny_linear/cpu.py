"""Skinny linear layers on the CPU: C++ (csrc/skinny_linear.cpp) for few rows, torch for many."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..native import ISA, TYPES, extension


def fits(M: int, dtype: torch.dtype, isa: str = ISA) -> bool:
    """Whether M rows meet a weight of this dtype here or in torch: whichever `anabranch bench linear` showed faster.

    torch multiplies float32 well from some rows on, and bfloat16 where the CPU multiplies it natively. Where it does
    not, torch widens bfloat16 so slowly that this kernel stayed ahead up to the 512 rows tried.
    """
    return M <= 16 or (dtype != torch.float32 and isa in ("avx2", "avx512"))


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, isa: str = ISA) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    M, width = rows.shape
    if not fits(M, weight.dtype, isa):
        if scales is not None:
            weight = (weight * scales[:, None]).to(x.dtype)
        return linear(x, weight, bias)
    x_row, step = rows.stride()
    if step != 1:
        rows = rows.contiguous()
        x_row = width
    weight_row, step = weight.stride()
    if step != 1:
        weight = weight.contiguous()
        weight_row = width
    scales = None if scales is None else scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    features = weight.shape[0]
    out = x.new_empty(M, features) if x.ndim == 2 else x.new_empty(*x.shape[:-1], features)
    extension.skinny_linear(
        rows.data_ptr(), TYPES[x.dtype], x_row, weight.data_ptr(), TYPES[weight.dtype], weight_row,
        0 if scales is None else scales.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), M, width, features, isa, torch.get_num_threads(),
    )  # fmt: skip
    return out
