"""Paged attention with different numbers of K and V heads (DiffQKV, arXiv 2501.13629), and the store into its pages."""

from importlib import import_module
from math import sqrt

import torch
from torch import Tensor

from ..library import define
from . import cpu, reference

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_attend = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens,"
    " Tensor cu_seqlens_q, Tensor? k_scales, Tensor? v_scales, float scale, int? window, int? v_top_k,"
    " bool renormalise) -> (Tensor, Tensor)",
    reference=reference.paged_attention,
    cpu=cpu.paged_attention,
    cuda=lambda *args: import_module(".gpu", __package__).paged_attention(*args),  # Triton loads on first use
    fake=lambda q, k_cache, v_cache, *rest: (
        q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
        q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32),
    ),
)

_store = define(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots,"
    " Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> ()",
    reference=reference.store_kv,
    cpu=cpu.store_kv,
    cuda=lambda *args: import_module(".gpu", __package__).store_kv(*args),
    fake=lambda *args: None,
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    window: int | None = None,
    v_top_k: int | None = None,
    renormalise: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of packed new tokens over cached pages; prefill chunks and decode steps mix in one call.

    q             [T, Hq, Dk]        new tokens of B sequences, packed; float32, float16 or bfloat16
    k_cache       [P, Hk, page, Dk]  float32, float16, bfloat16, or int8 with `k_scales` [P, Hk, page] float32
    v_cache       [P, Hv, page, Dv]  likewise with `v_scales`; its dtype is independent of K's
    page_table    [B, max_pages]     int32; page of tokens [i * page, (i + 1) * page) of each sequence
    seq_lens      [B]                int32; cached tokens, the new ones included; 0 marks a padding row
    cu_seqlens_q  [B + 1]            int32; where each sequence's new tokens start in q
    scale         factor of the scores; 1 / sqrt(Dk) if None
    window        a token sees itself and `window - 1` tokens before it; all if None
    v_top_k       read V only at each query head's k most probable positions (section B.2 of the paper); the rest of the
                  probability is dropped, so |out - exact| <= (1 - kept) * max|V|; `renormalise` divides by what is kept
    returns       [T, Hq, Dv] dtype of q; with `return_lse` also [T, Hq] float32: natural logarithm of each row's sum

    Query head i reads K head i * Hk // Hq and V head i * Hv // Hq. Hq must be a multiple of Hk and of Hv; neither of
    these has to divide the other. A row that sees no token (padding) gives 0 and an lse of -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit and, on the CPU, for page numbers and lengths out of
    range. On a GPU reading those would stall the stream: rows with a page out of range come out as NaN, nothing is read
    out of bounds.
    """
    _check_caches(k_cache, v_cache, k_scales, v_scales)
    if q.ndim != 3 or q.dtype not in QUERY_DTYPES:
        raise ValueError(f"q must be [T, Hq, Dk] in one of {_names(QUERY_DTYPES)}, got {_what(q)}")
    Hq, Dk = q.shape[1:]
    Hk, Hv, B = k_cache.shape[1], v_cache.shape[1], seq_lens.shape[0] if seq_lens.ndim else -1
    if Dk != k_cache.shape[3]:
        raise ValueError(f"q and k_cache must have the same Dk, got q {list(q.shape)}, k_cache {list(k_cache.shape)}")
    if Hq % Hk or Hq % Hv:
        raise ValueError(f"Hq must be a multiple of Hk and of Hv, got Hq={Hq}, Hk={Hk}, Hv={Hv}")
    _check_indices(seq_lens, [-1], "seq_lens [B]")
    _check_indices(page_table, [B, -1], "page_table [B, max_pages]")
    _check_indices(cu_seqlens_q, [B + 1], "cu_seqlens_q [B + 1]")
    for tensor, name in ((k_cache, "k_cache"), (page_table, "page_table"), (seq_lens, "seq_lens"),
                         (cu_seqlens_q, "cu_seqlens_q")):  # fmt: skip
        if tensor.device != q.device:
            raise ValueError(f"all tensors must be on q's device {q.device}, got {name} on {tensor.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if v_top_k is not None and v_top_k < 1:
        raise ValueError(f"v_top_k must be at least 1 or None, got {v_top_k}")
    if renormalise and v_top_k is None:
        raise ValueError("renormalise has a meaning only with v_top_k, got v_top_k=None")
    out, lse = _attend(
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, k_scales, v_scales,
        1 / sqrt(Dk) if scale is None else scale, window, v_top_k, renormalise,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their pages, in place.

    k         [T, Hk, Dk]        any float dtype; converted to the cache's
    v         [T, Hv, Dv]
    k_cache   [P, Hk, page, Dk]  int8 caches are quantised symmetrically: scale = max|row| / 127 for each token and head
    v_cache   [P, Hv, page, Dv]
    slots     [T] int64          page * page_size + offset of each token; a negative slot skips its token
    k_scales  [P, Hk, page]      float32, written for int8 caches; likewise `v_scales`

    Raises ValueError for shapes, dtypes or devices that do not fit and, on the CPU, for a slot past the last page (a
    GPU skips such a token).
    """
    _check_caches(k_cache, v_cache, k_scales, v_scales)
    T = k.shape[0] if k.ndim else -1
    for row, cache, name in ((k, k_cache, "k"), (v, v_cache, "v")):
        if row.dtype not in QUERY_DTYPES or list(row.shape) != [T, cache.shape[1], cache.shape[3]]:
            raise ValueError(
                f"{name} must be [T, {cache.shape[1]}, {cache.shape[3]}] in one of {_names(QUERY_DTYPES)} "
                f"to fit its cache {list(cache.shape)}, got {_what(row)}"
            )
        if row.device != slots.device or cache.device != slots.device:
            raise ValueError(f"all tensors must be on one device, got {name} on {row.device}, slots on {slots.device}")
    if list(slots.shape) != [T] or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T={T}] torch.int64, got {_what(slots)}")
    _store(k, v, k_cache, v_cache, slots, k_scales, v_scales)


def _check_caches(k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
    for cache, scales, name in ((k_cache, k_scales, "k"), (v_cache, v_scales, "v")):
        if cache.ndim != 4 or cache.dtype not in CACHE_DTYPES or 0 in cache.shape[1:]:
            raise ValueError(
                f"{name}_cache must be [P, H{name}, page, D{name}] in one of {_names(CACHE_DTYPES)}, got {_what(cache)}"
            )
        if cache.stride(3) != 1:
            raise ValueError(f"{name}_cache rows must be contiguous, got strides {cache.stride()}")
        if (scales is not None) != (cache.dtype == torch.int8):
            raise ValueError(
                f"{name}_scales goes with an int8 {name}_cache and only with it, got {name}_cache {cache.dtype} and "
                f"{name}_scales {None if scales is None else _what(scales)}"
            )
        if scales is not None and (
            scales.dtype != torch.float32
            or scales.shape != cache.shape[:3]
            or not scales.is_contiguous()
            or scales.device != cache.device
        ):
            raise ValueError(
                f"{name}_scales must be contiguous {list(cache.shape[:3])} float32 on {cache.device}, "
                f"got {_what(scales)}"
            )
    if k_cache.shape[0] != v_cache.shape[0] or k_cache.shape[2] != v_cache.shape[2]:
        raise ValueError(
            "k_cache and v_cache must have the same number of pages and page size, "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if k_cache.device != v_cache.device:
        raise ValueError(f"k_cache and v_cache must be on one device, got {k_cache.device} and {v_cache.device}")


def _check_indices(tensor: Tensor, shape: list[int], name: str) -> None:
    fits = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 with matching sizes, got {_what(tensor)}")


def _what(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
