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
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    M, width = rows.shape
    if not fits(M, weight.dtype, isa):
        if scales is not None:
            weight = (weight * scales[:, None]).to(x.dtype)
        return linear(x, weight, bias)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    scales = None if scales is None else scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    extension.skinny_linear(
        rows.data_ptr(), TYPES[x.dtype], rows.stride(0), weight.data_ptr(), TYPES[weight.dtype], weight.stride(0),
        0 if scales is None else scales.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), M, width, weight.shape[0], isa, torch.get_num_threads(),
    )  # fmt: skip
    return out
