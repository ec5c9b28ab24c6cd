"""Skinny linear layers on the CPU: C++ (csrc/skinny_linear.cpp) for few rows, torch for many."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..native import ISA, TYPES, extension


def fits(M: int, x: torch.dtype, weight: Tensor, isa: str = ISA) -> bool:
    """Whether M rows of dtype x meet this weight here or in torch: whichever `anabranch bench linear` showed faster.

    torch multiplies float32 well from some rows on, and bfloat16 where the CPU multiplies it natively. Where it does
    not, torch widens bfloat16 so slowly that this kernel stayed ahead up to the 512 rows tried. With tiles on both
    sides torch is ahead once rearranging the weight, which it does in every call, no longer counts. An int8 weight it
    has to widen first; here x is cut into digits, which counts the less the more outputs there are.
    """
    if isa == "amx" and x != torch.float32:
        if weight.dtype == torch.bfloat16:
            return M <= 128
        if weight.dtype == torch.int8:
            return max(64, min(512, weight.shape[0] // 6)) >= M
    return M <= 16 or (weight.dtype != torch.float32 and isa in ("avx2", "avx512"))


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, isa: str = ISA) -> Tensor:
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    M, width = rows.shape
    if not fits(M, x.dtype, weight, isa):
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
