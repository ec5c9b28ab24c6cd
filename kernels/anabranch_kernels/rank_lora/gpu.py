"""Adapters with routed ranks on the GPU: which Triton kernels take which tokens. The plans are in the gpu_*.py beside.

Layout   few tokens (decode): products with the columns split over programs, then one program for each token and some
         columns that routes and reads the picked rows of B; two launches. Many tokens: sorted by adapter, products and
         routing in one launch, expansion over all ranks as a matrix product in another; nothing is gathered. Wide
         adapters (more than gpu_shrink.FUSED rows of router and A together) take the second kernel of few tokens.
Grid     shapes alone decide, the tables of adapters and tokens stay on the device: a CUDA graph holds for any tokens.
Numerics float32 scores and sums. A token's result may differ in rounding between few and many tokens.
Not here float64, and more than gpu_expand.MOST rows together: the reference, on purpose. A token of an adapter that
         does not exist has none (on a CPU that is an error; here it would take a wait for the device to see it).
"""

import torch
from torch import Tensor

from ..launch import on_its_device
from ..tensors import dense_rows
from . import reference
from .gpu_backward import gradients
from .gpu_expand import MOST, expand, sums
from .gpu_shrink import FEW, FUSED, plan, shrink, sort_tokens


@on_its_device
def rank_lora_forward(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor,
    chosen: int, active: int, rows: int, ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T = len(x)
    if _for_the_reference(x, places, rows, ranks):
        return reference.rank_lora_forward(
            x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks
        )
    y, counts = x.new_empty(T, b.shape[1]), x.new_zeros(len(router), dtype=torch.int64)
    picked = x.new_full((T, chosen), -1, dtype=torch.int32)
    gates, h = x.new_zeros(T, chosen, dtype=torch.float32), x.new_zeros(T, active, dtype=torch.float32)
    kept = picked, gates, h, counts
    _branch(y, kept, x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks)
    return y, counts, picked, gates, h


@on_its_device
def add_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, chosen: int, active: int, rows: int, ranks: int,
) -> None:  # fmt: skip
    if _for_the_reference(x, places, rows, ranks) or y.stride(1) != 1:
        reference.add_rank_lora(
            y, x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks
        )  # fmt: skip
    else:
        _branch(y, None, x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks)


def add_fused_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, parts: list[int], chosen: int, active: int, rows: int, ranks: int,
) -> None:  # fmt: skip
    for at in range(0, len(parts), 3):
        p, begin, end = parts[at : at + 3]
        add_rank_lora(
            y[:, begin:end], x, a[p], b[:, begin:end], router[p], bias[p], places[p], scales[p], adapter_of, chosen,
            active, rows, ranks,
        )  # fmt: skip


@on_its_device
def rank_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, picked: Tensor, gates: Tensor, h: Tensor, rows: int, ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _for_the_reference(x, places, rows, ranks):
        return reference.rank_lora_backward(
            grad, x, a, b, router, bias, places, scales, adapter_of, picked, gates, h, rows, ranks
        )
    grad, x, a, b, router = (dense_rows(t) for t in (grad, x, a, b, router))
    return gradients(
        grad, x, a, b, router, bias.contiguous(), places, scales, adapter_of.contiguous(), picked, gates, h,
        _padded(rows), _padded(ranks), _aligned(router, a, b),
    )  # fmt: skip


def _branch(
    y: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor] | None, x: Tensor, a: Tensor, b: Tensor, router: Tensor,
    bias: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor, chosen: int, active: int, rows: int, ranks: int,
) -> None:  # fmt: skip
    """y and what is kept; or nothing kept and added to y."""
    x, a, b, router = (dense_rows(t) for t in (x, a, b, router))
    bias, adapter_of = bias.contiguous(), adapter_of.contiguous()
    (T, D), A, GW, RW = x.shape, len(places), _padded(rows), _padded(ranks)
    aligned = _aligned(router, a, b)
    few, rounded = T <= FEW, 1 << (T - 1).bit_length()
    by_adapter = None if few else sort_tokens(adapter_of, A)
    if few or GW + RW > FUSED:
        launch = plan(rounded, D, A, GW, RW, chosen, active, routed=False, kept=False, few=few, aligned=aligned)
        parts = -(-D // launch.constants["PART"])
        partial = torch.empty(parts, T, GW + RW, dtype=torch.float32, device=x.device)
        shrink(launch, x, router, a, bias, places, adapter_of, by_adapter, partial, None, None)
        expand(partial, bias, b, places, scales, adapter_of, y, kept, GW, RW, chosen, active)
        return
    assert by_adapter is not None
    launch = plan(rounded, D, A, GW, RW, chosen, active, routed=True, kept=kept is not None, few=False, aligned=aligned)
    factors = x.new_empty(T, RW)
    shrink(launch, x, router, a, bias, places, adapter_of, by_adapter, None, factors, kept)
    sums(factors, router, b, places, scales, by_adapter, y, 0, RW, add=kept is None, aligned=aligned)


def _for_the_reference(x: Tensor, places: Tensor, rows: int, ranks: int) -> bool:
    nothing = not (len(x) and len(places) and ranks)
    return x.dtype == torch.float64 or nothing or _padded(rows) + _padded(ranks) > MOST


def _padded(n: int) -> int:
    return -(-n // 16) * 16


def _aligned(*matrices: Tensor) -> bool:
    """Does every row begin at a multiple of 16 bytes?"""
    return not any((t.data_ptr() | t.stride(0) * t.itemsize) % 16 for t in matrices)
