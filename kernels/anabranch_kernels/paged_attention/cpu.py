"""Paged attention on the CPU: pointers and strides to C++ (csrc/paged_attention.cpp)."""

import torch
from torch import Tensor

from ..native import ISA, TYPES, extension

INT32_MAX = 2**31 - 1
Strided = tuple[int, ...]  # address, type and strides of a tensor; see _rows


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
    window: int | None,
    v_top_k: int | None,
    renormalise: bool,
    isa: str = ISA,
) -> tuple[Tensor, Tensor]:
    if q.stride(2) != 1:
        q = q.contiguous()
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    seq_lens, cu_seqlens_q = seq_lens.contiguous(), cu_seqlens_q.contiguous()
    T, Hq, Dk = q.shape
    P, Hk, page, _ = k_cache.shape
    Hv, Dv = v_cache.shape[1], v_cache.shape[3]
    B, max_pages = page_table.shape
    out = q.new_empty(T, Hq, Dv)
    lse = q.new_empty(T, Hq, dtype=torch.float32)
    extension.paged_attention(
        _rows(q), _rows(k_cache), _rows(v_cache), _address(k_scales), _address(v_scales),
        (page_table.data_ptr(), page_table.stride(0)), seq_lens.data_ptr(), cu_seqlens_q.data_ptr(),
        out.data_ptr(), lse.data_ptr(), (T, B, Hq, Hk, Hv, Dk, Dv, P, page, max_pages),
        scale, min(window or 0, INT32_MAX), min(v_top_k or 0, INT32_MAX), renormalise, isa, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    slots = slots.contiguous()
    extension.store_kv(*store_arguments(k, v, k_cache, v_cache, slots, k_scales, v_scales), torch.get_num_threads())


def store_arguments(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> tuple[Strided, Strided, Strided, Strided, int, int, int, tuple[int, ...]]:
    """What both extensions take; rows of k and v and the slots must be contiguous."""
    T, Hk, Dk = k.shape
    Hv, Dv = v.shape[1:]
    return (
        _rows(k), _rows(v), _rows(k_cache), _rows(v_cache), _address(k_scales), _address(v_scales), slots.data_ptr(),
        (T, Hk, Hv, Dk, Dv, k_cache.shape[0], k_cache.shape[2]),
    )  # fmt: skip


def _rows(tensor: Tensor) -> tuple[int, ...]:
    """Address, type and strides of all dimensions but the last, which is contiguous."""
    return (tensor.data_ptr(), TYPES[tensor.dtype], *tensor.stride()[:-1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
