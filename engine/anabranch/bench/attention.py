"""Cases of the attention ops: decode and prefill of a DiffQKV shape beside its GQA twin and torch.

All contenders of a case compute the same function. The twin and torch's ops, which know no unequal heads, get each K
head repeated until there are as many as V heads; a step of decode goes through the caches of so many layers that
nothing stays in the CPU's caches from one step to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.attention.op import attention
from anabranch_kernels.memory import prefer_huge_pages
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

DECODE = (
    "anabranch",
    "anabranch, int8 cache",
    "anabranch, GQA twin",
    "torch SDPA, expanded K",
    "torch SDPA, expanded K, heads as rows",
    "torch matmul, expanded K",
)
PREFILL = (
    "anabranch, paged",
    "anabranch, dense",
    "torch SDPA, K expanded before",
    "torch SDPA, K and V expanded to Hq before",
    "torch SDPA, expansion in the clock",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads and widths; the default is Sigma 1.5B's layer (arXiv 2501.13629, table 14)."""

    Hq: int = 32
    Hk: int = 4
    Hv: int = 16
    width: int = 64
    page: int = 64

    def __post_init__(self) -> None:
        if self.Hq % self.Hv or self.Hv % self.Hk:
            raise ValueError(f"Hq must be a multiple of Hv and Hv of Hk, got Hq={self.Hq}, Hk={self.Hk}, Hv={self.Hv}")

    def cache_bytes(self, tokens: int, element_bytes: int, *, expanded: bool = False, scale_bytes: int = 0) -> int:
        """Bytes of K and V; `expanded` counts as many K heads as V heads, `scale_bytes` are per token and head."""
        heads = (self.Hv if expanded else self.Hk) + self.Hv
        return tokens * heads * (self.width * element_bytes + scale_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Queries and the cache of one layer, before any contender has laid it out.

    q  [T, Hq, D]    k  [S, Hk, D]    v  [S, Hv, D]
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """One sequence in a paged cache, its pages in random order."""

    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None


def decode(context: int, *, shape: Shape, dtype: torch.dtype, working_set: int) -> Case:
    """One new token of one sequence with `context` cached ones, through layers of `working_set` bytes in all."""
    count = -(-working_set // shape.cache_bytes(context, dtype.itemsize))
    random = torch.Generator().manual_seed(context)
    layers = [make_layer(1, context, shape, dtype, random) for _ in range(count)]
    expanded = [Layer(q=layer.q, k=expand(layer.k, shape.Hv), v=layer.v) for layer in layers]
    flops = 4 * shape.Hq * shape.width * context * count
    own, twin = (count * shape.cache_bytes(context, dtype.itemsize, expanded=wide) for wide in (False, True))
    eight_bit = count * shape.cache_bytes(context, 1, scale_bytes=4)
    dense = [dense_heads(layer) for layer in expanded]

    steps = (
        (paged_step(layers, shape.page), own),
        (paged_step(layers, shape.page, torch.int8), eight_bit),
        (paged_step(expanded, shape.page), twin),
        (lambda: each(dense, grouped_sdpa), twin),
        (lambda: each(dense, folded_sdpa), twin),
        (lambda: each(dense, plain_matmul), twin),
    )
    return Case(
        name=f"decode S={context}",
        calls=count,
        contenders=tuple(
            Contender(name=name, step=step, read_bytes=read_bytes, flops=flops)
            for name, (step, read_bytes) in zip(DECODE, steps, strict=True)
        ),
    )


def prefill(tokens: int, *, shape: Shape, dtype: torch.dtype) -> Case:
    """All of a prompt at once. Compute-bound: the bytes are one read of q, k and v."""
    random = torch.Generator().manual_seed(tokens)
    layer = make_layer(tokens, tokens, shape, dtype, random)
    wide = Layer(q=layer.q, k=expand(layer.k, shape.Hv), v=layer.v)
    full = Layer(q=layer.q, k=expand(layer.k, shape.Hq), v=expand(layer.v, shape.Hq))
    read_bytes = (layer.q.numel() + layer.k.numel() + layer.v.numel()) * dtype.itemsize
    flops = 2 * shape.Hq * shape.width * tokens * (tokens + 1)  # half of the square: causal
    grouped, repeated = dense_heads(wide), dense_heads(full)

    def expanding() -> Tensor:
        return causal_sdpa(dense_heads(Layer(q=layer.q, k=expand(layer.k, shape.Hv), v=layer.v)))

    steps = (
        paged_step([layer], shape.page),
        lambda: attention(layer.q[None], layer.k[None], layer.v[None]),
        lambda: causal_sdpa(grouped),
        lambda: causal_sdpa(repeated),
        expanding,
    )
    return Case(
        name=f"prefill T={tokens}",
        contenders=tuple(
            Contender(name=name, step=step, read_bytes=read_bytes, flops=flops)
            for name, step in zip(PREFILL, steps, strict=True)
        ),
    )


def make_layer(T: int, S: int, shape: Shape, dtype: torch.dtype, random: torch.Generator) -> Layer:
    """Normal values; T new tokens of S in all."""
    sizes = (T, shape.Hq), (S, shape.Hk), (S, shape.Hv)
    q, k, v = (torch.randn(*size, shape.width, generator=random).to(dtype) for size in sizes)
    return Layer(q=q, k=k, v=v)


def expand(x: Tensor, heads: int) -> Tensor:
    """[S, H, D] -> [S, heads, D], each head repeated in place."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def fill_pages(layer: Layer, page: int, dtype: torch.dtype, random: torch.Generator) -> Pages:
    """Store a layer's K and V into a paged cache of `dtype`."""
    S = layer.k.shape[0]
    P = -(-S // page)
    table = torch.randperm(P, generator=random)
    positions = torch.arange(S)
    slots = table[positions // page] * page + positions % page
    caches = [prefer_huge_pages(torch.empty(P, x.shape[1], page, x.shape[2], dtype=dtype)) for x in (layer.k, layer.v)]
    scales = [torch.empty(cache.shape[:3]) if dtype == torch.int8 else None for cache in caches]
    store_kv(layer.k, layer.v, caches[0], caches[1], slots, k_scales=scales[0], v_scales=scales[1])
    return Pages(
        k_cache=caches[0], v_cache=caches[1], page_table=table[None].int(), k_scales=scales[0], v_scales=scales[1]
    )


def paged_step(layers: list[Layer], page: int, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Our op over every layer, one sequence; `dtype` of the cache, that of K if None."""
    random = torch.Generator().manual_seed(0)
    pages = [fill_pages(layer, page, dtype or layer.k.dtype, random) for layer in layers]
    T, S = layers[0].q.shape[0], layers[0].k.shape[0]
    seq_lens, cu_seqlens_q = torch.tensor([S], dtype=torch.int32), torch.tensor([0, T], dtype=torch.int32)

    def step() -> Tensor:
        outputs = []
        for layer, cache in zip(layers, pages, strict=True):
            out = paged_attention(
                layer.q, cache.k_cache, cache.v_cache, cache.page_table, seq_lens, cu_seqlens_q,
                k_scales=cache.k_scales, v_scales=cache.v_scales,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            outputs.append(out)
        return torch.stack(outputs)

    return step


def dense_heads(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """[1, H, S, D] contiguous, as torch's attention likes its q, k and v; in huge pages, as our caches are."""
    q, k, v = (in_huge_pages(x.transpose(0, 1))[None] for x in (layer.q, layer.k, layer.v))
    return q, k, v


def in_huge_pages(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return prefer_huge_pages(torch.empty(x.shape, dtype=x.dtype)).copy_(x)


def each(layers: list[tuple[Tensor, Tensor, Tensor]], op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """One decode step of a torch peer: [L, 1, Hq, D]."""
    return torch.stack([op(*layer).reshape(1, layer[0].shape[1], -1) for layer in layers])


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own grouping of query heads."""
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def folded_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a group as rows of one head: for a single new token the same, and K is read once."""
    return scaled_dot_product_attention(q.reshape(1, k.shape[1], -1, q.shape[3]), k, v)


def plain_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched products and a softmax."""
    rows = q.reshape(k.shape[1], -1, q.shape[3]) * q.shape[3] ** -0.5
    return torch.softmax(rows @ k[0].mT, dim=-1) @ v[0]


def causal_sdpa(heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[1, T, Hq, D], as our ops return it."""
    q, k, v = heads
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
