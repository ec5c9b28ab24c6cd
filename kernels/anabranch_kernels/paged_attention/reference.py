"""Paged attention as the formula reads, one sequence at a time, float64 inside."""

import torch
from torch import Tensor


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
    check_tables(page_table, seq_lens, cu_seqlens_q, T, k_cache.shape[0], k_cache.shape[2])
    wide = torch.float32 if q.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    out = q.new_zeros(T, Hq, v_cache.shape[3])
    lse = q.new_full((T, Hq), -torch.inf, dtype=torch.float32)
    starts = cu_seqlens_q.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        n = rows.stop - rows.start
        if n == 0 or length == 0:
            continue
        k = _gather(k_cache, k_scales, page_table[b], length, wide).repeat_interleave(Hq // k_cache.shape[1], dim=0)
        v = _gather(v_cache, v_scales, page_table[b], length, wide).repeat_interleave(Hq // v_cache.shape[1], dim=0)
        scores = torch.einsum("ahd,hjd->haj", q[rows].to(wide), k) * scale  # [Hq, n, length]
        behind = torch.arange(length - n, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        visible = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        scores = scores.masked_fill(~visible, -torch.inf)
        p = scores.softmax(dim=-1)
        if v_top_k is not None and v_top_k < length:
            kept = torch.zeros_like(p).scatter_(-1, p.topk(v_top_k, dim=-1).indices, 1.0)
            p = p * kept
            if renormalise:
                p = p / p.sum(dim=-1, keepdim=True)
        out[rows] = torch.einsum("haj,hjd->ahd", p, v).to(q.dtype)
        lse[rows] = scores.logsumexp(dim=-1).T.float()
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
    P, _, page, _ = k_cache.shape
    if slots.numel() and int(slots.max()) >= P * page:
        raise ValueError(f"slots must be below P * page = {P * page}, got {int(slots.max())}")
    used = slots >= 0
    pages, offsets = slots[used] // page, slots[used] % page
    for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        rows = new[used].float()
        if scales is not None:
            scale = rows.abs().amax(dim=-1) / 127
            scales[pages, :, offsets] = scale
            # A row of zeros has scale 0 and stays zeros; rounding is to the nearest, ties to even.
            rows = (rows / torch.where(scale == 0, 1.0, scale)[..., None]).round().clamp(-127, 127)
        cache[pages, :, offsets] = rows.to(cache.dtype)


def check_tables(page_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, T: int, P: int, page: int) -> None:
    """Raise ValueError unless every page and token that the tables name exists."""
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != T:
        raise ValueError(f"cu_seqlens_q must run from 0 to T={T}, got {starts[0]} to {starts[-1]}")
    for b, length in enumerate(seq_lens.tolist()):
        n = starts[b + 1] - starts[b]
        if n < 0:
            raise ValueError(f"cu_seqlens_q must not decrease, got {starts[b]} then {starts[b + 1]} at sequence {b}")
        if length < 0 or length > page_table.shape[1] * page:
            raise ValueError(
                f"seq_lens must lie in [0, max_pages * page = {page_table.shape[1] * page}], "
                f"got {length} at sequence {b}"
            )
        if 0 < length < n:
            raise ValueError(f"seq_lens counts the new tokens too, got {length} with {n} new at sequence {b}")
        used = page_table[b, : -(-length // page)]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= P):
            raise ValueError(
                f"page_table must lie in [0, P={P}), got [{int(used.min())}, {int(used.max())}] at sequence {b}"
            )


def _gather(cache: Tensor, scales: Tensor | None, pages: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The cached rows of one sequence, [H, length, D] in `dtype`."""
    page = cache.shape[2]
    used = pages[: -(-length // page)].long()
    rows = cache[used].to(dtype)  # [pages, H, page, D]
    if scales is not None:
        rows = rows * scales[used].to(dtype)[..., None]
    return rows.transpose(0, 1).flatten(1, 2)[:, :length]
