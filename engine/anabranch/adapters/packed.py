"""One layer's adapter as the op anabranch_kernels.rank_lora reads it."""

from typing import NamedTuple

import torch
from torch import Tensor

from anabranch_kernels.rank_lora.op import Adapter


class Packed(NamedTuple):
    """An adapter's tensors, and where it lies in them: they hold nothing else.

    a       [r, inputs]
    b       [r, outputs]   B stored by rank
    router  [G, inputs]    no rows for a constant gate
    bias    [G] float32
    """

    place: Adapter
    a: Tensor
    b: Tensor
    router: Tensor
    bias: Tensor


def without_router(a: Tensor, b: Tensor, scale: float) -> Packed:
    """Plain LoRA: a [r, inputs], b [r, outputs]."""
    return Packed(Adapter(first_rank=0, ranks=len(a), scale=scale), a, b, a[:0], torch.zeros(0, device=a.device))
