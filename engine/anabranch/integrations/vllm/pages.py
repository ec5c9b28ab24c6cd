"""Pages of vLLM's cache as pages of ours: sizes, views without copies, the columns of a wide output.

vLLM knows one number of KV heads. DiffQKV with Hv = r Hk fits all the same when r adjacent V heads count as one head r
times as wide ("wide V"): Hk heads of Dk + r Dv elements are exactly Hk Dk + Hv Dv, and vLLM's block manager, told
head_size = Dk and head_size_v = r Dv, accounts for the bytes without a patch.

vLLM hands over a layer's cache as [P, Hk, page, Dk + r Dv], each page's bytes in one piece. What stands where inside a
page is up to the back-end that writes and reads it. Ours puts K first, then V:

    [ K: Hk x page x Dk | V: Hv x page x Dv ]

so each has one stride from head to head. In vLLM's own order (K and V of a token and head side by side) V heads follow
one another at a stride of Dv inside a wide head and at another one across, which no view [P, Hv, page, Dv] has.
"""

from math import prod

from torch import Tensor


def wide_v(k_heads: int, v_heads: int, v_dim: int) -> int:
    """The head_size_v to give vLLM's Attention: r * v_dim, where r = v_heads / k_heads.

    Raises ValueError unless r is a whole number.
    """
    if k_heads < 1 or v_heads % k_heads:
        raise ValueError(f"the number of V heads must be a multiple of that of K heads, got {k_heads=}, {v_heads=}")
    return v_heads // k_heads * v_dim


def page_views(cache: Tensor, k_dim: int, v_heads: int) -> tuple[Tensor, Tensor]:
    """K [P, Hk, page, Dk] and V [P, Hv, page, Dv] inside `cache` [P, Hk, page, Dk + r Dv], sharing its memory.

    Raises ValueError if a page's elements are not in one piece or the sizes do not fit.
    """
    if cache.ndim != 4:
        raise ValueError(f"cache must be [P, Hk, page, Dk + r * Dv], got {list(cache.shape)}")
    P, Hk, page, columns = cache.shape
    r = v_heads // Hk
    if v_heads != r * Hk or r < 1 or columns <= k_dim or (columns - k_dim) % r:
        raise ValueError(f"no {v_heads} V heads fit {list(cache.shape)} with {k_dim} columns of K")
    if not _in_one_piece(cache[0]):
        raise ValueError(f"each page must lie in one piece, got {list(cache.shape)} with strides {cache.stride()}")
    v_dim, start, step = (columns - k_dim) // r, cache.storage_offset(), cache.stride(0)
    k = cache.as_strided((P, Hk, page, k_dim), (step, page * k_dim, k_dim, 1), start)
    v = cache.as_strided((P, v_heads, page, v_dim), (step, page * v_dim, v_dim, 1), start + Hk * page * k_dim)
    return k, v


def _in_one_piece(page: Tensor) -> bool:
    """Do these elements fill a stretch of memory without gaps, in any order?"""
    sizes = sorted((stride, size) for size, stride in zip(page.shape, page.stride(), strict=True) if size > 1)
    return all(stride == prod(size for _, size in sizes[:i]) for i, (stride, _) in enumerate(sizes))


def own_columns(wide: Tensor, k_heads: int, v_heads: int) -> Tensor:
    """The view [T, Hk, r, Hq / Hv, Dv] of a wide output [T, Hq, r Dv] that holds each query head's own V head.

    A back-end that knows only wide heads fills all columns; those of query head i that mean something are
    u Dv ... (u + 1) Dv, u = (i // (Hq / Hv)) % r. `.reshape(T, Hq, Dv)` of the view is the attention's result.
    """
    T, Hq, columns = wide.shape
    r = v_heads // k_heads
    blocks = wide.view(T, k_heads, r, Hq // v_heads, r, columns // r)
    return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2)
