"""Paged attention and its store on the GPU: which Triton kernel takes which rows. The plans are in the gpu_*.py beside.

A call may mix decode steps, short drafts and long chunks, and their lengths live on the device, where the launcher must
not look (a CUDA graph replays it with other lengths). So it decides by shapes alone: when every sequence must be short,
the split-KV kernel does all rows; otherwise both kernels run and each leaves the other's sequences alone.
"""

import torch
from torch import Tensor

from ..launch import on_its_device
from ..native import cuda_extension
from .cpu import store_arguments
from .gpu_decode import SHORT, decode
from .gpu_pages import EVERYTHING
from .gpu_prefill import prefill
from .gpu_select import select
from .gpu_store import store

FEW = 16  # packed rows up to which it takes the whole batch


@on_its_device
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
) -> tuple[Tensor, Tensor]:
    T, Hq, _ = q.shape
    B, pages = page_table.shape
    if T == 0 or B == 0 or pages == 0:
        empty = q.new_zeros(T, Hq, v_cache.shape[3])
        return empty, q.new_full((T, Hq), -torch.inf, dtype=torch.float32)
    q = q if q.stride(2) == 1 else q.contiguous()
    alone = v_top_k is not None or max(B, FEW) >= T
    out, lse = q.new_empty(T, Hq, v_cache.shape[3]), q.new_empty(T, Hq, dtype=torch.float32)
    if not alone:  # one kernel alone writes every row; two leave out the rows of no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    tables = page_table.contiguous(), seq_lens.contiguous(), cu_seqlens_q.contiguous()
    seen = EVERYTHING if window is None else min(window, EVERYTHING)
    problem = q, k_cache, v_cache, *tables, k_scales, v_scales, scale, seen, out, lse
    if v_top_k is not None:
        select(*problem, v_top_k=v_top_k, renormalise=renormalise)
    elif alone:
        decode(*problem, longest=None)
    else:
        decode(*problem, longest=SHORT)
        prefill(*problem, shortest=SHORT + 1)
    return out, lse


@on_its_device
def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    if k.shape[0]:
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        arguments = k, v, k_cache, v_cache, slots.contiguous(), k_scales, v_scales
        if cuda_extension is not None and k.is_cuda and k.dtype == v.dtype:
            cuda_extension.store_kv(*store_arguments(*arguments), torch.cuda.current_stream(k.device).cuda_stream)
        else:
            store(*arguments)
