"""What is timed on a GPU: decode, prefill and training of a DiffQKV shape, the coordinate-wise rules, products over
finite fields and geometric medians of long rows.

Ours stands beside every peer that will run a case. A peer that refuses one (a back-end without unequal heads, a package
that is not installed) is named with its reason instead of a time. Decode walks through the caches of several layers,
so that nothing is served by the L2 cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from anabranch.bench.attention import Shape
from anabranch.bench.coordinate_rules import coordinate_rules
from anabranch.bench.timing import Case, Contender
from anabranch_kernels.attention.op import attention
from anabranch_kernels.field_coding.op import Field, multiply
from anabranch_kernels.geometric_median.op import centred_gram, combine, geometric_median
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

INT8_TOLERANCE = 0.05  # one part in 254 on each K and V element, before the softmax spreads it
WEISZFELD_STEPS = 10  # of the peers' medians: what federated code runs
Step = Callable[[], Tensor]


@dataclass(slots=True)
class Bench:
    """Where cases run, and who did not.

    wrap     makes a step cheap to launch (a CUDA graph); a step it cannot wrap is timed as it is
    compile  torch.compile, or nothing where compiling is not the point
    """

    device: torch.device
    dtype: torch.dtype
    wrap: Callable[[Step], Step]
    compile: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    absent: list[str] = field(default_factory=list)

    def contenders(self, case: str, steps: dict[str, tuple[Step, int, int, float]]) -> tuple[Contender, ...]:
        """The steps that run, as contenders: name -> (step, bytes, operations, tolerance)."""
        found = []
        for name, (step, read_bytes, flops, tolerance) in steps.items():
            try:
                wrapped = self.wrap(step)
                wrapped()
            except Exception as error:  # a peer's refusal is a result
                reason = str(error).strip().splitlines()
                self.absent.append(f"{case}: {name}: {type(error).__name__}: {reason[0] if reason else ''}")
                continue
            found.append(Contender(name=name, step=wrapped, read_bytes=read_bytes, flops=flops, tolerance=tolerance))
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One layer: B sequences of `context` tokens in pages of random order, and the same dense.

    k_cache, v_cache  [P, H, page, D]    table  [B, pages]    k, v  [B, context, H, D]
    """

    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    k: Tensor
    v: Tensor


def make_cache(bench: Bench, shape: Shape, B: int, context: int) -> Cache:
    pages = -(-context // shape.page)
    order = torch.randperm(B * pages, device=bench.device)
    make = {"device": bench.device, "dtype": bench.dtype}
    k_cache = torch.randn(B * pages, shape.Hk, shape.page, shape.width, **make)
    v_cache = torch.randn(B * pages, shape.Hv, shape.page, shape.width, **make)
    table = order.view(B, pages).int()
    k, v = (_dense(x, table, context) for x in (k_cache, v_cache))
    return Cache(k_cache=k_cache, v_cache=v_cache, table=table, k=k, v=v)


def _dense(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """[B, context, H, D] of a paged cache."""
    return cache[table.long()].transpose(2, 3).flatten(1, 2)[:, :context].contiguous()


def _quantised(bench: Bench, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same pages in int8 with their scales."""
    P, Hk, page, D = cache.k_cache.shape
    Hv = cache.v_cache.shape[1]
    k_cache, v_cache = (torch.empty(P, H, page, D, dtype=torch.int8, device=bench.device) for H in (Hk, Hv))
    k_scales, v_scales = (torch.empty(P, H, page, device=bench.device) for H in (Hk, Hv))
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (cache.k_cache, cache.v_cache))
    slots = torch.arange(P * page, device=bench.device)
    store_kv(k, v, k_cache, v_cache, slots, k_scales=k_scales, v_scales=v_scales)
    return k_cache, v_cache, k_scales, v_scales


def decode(bench: Bench, shape: Shape, B: int, context: int, working_set: int) -> Case:
    """One new token of each of B sequences with `context` cached ones."""
    name = f"decode {shape.Hq}/{shape.Hk}/{shape.Hv} d={shape.width} B={B} t={context}"
    element = bench.dtype.itemsize
    own_bytes = shape.cache_bytes(B * context, element)
    twin_bytes = shape.cache_bytes(B * context, element, expanded=True)
    int8_bytes = shape.cache_bytes(B * context, 1, scale_bytes=4)
    layers = min(64, max(1, -(-working_set // own_bytes)))
    caches = [make_cache(bench, shape, B, context) for _ in range(layers)]
    queries = [torch.randn(B, shape.Hq, shape.width, device=bench.device, dtype=bench.dtype) for _ in caches]
    lens = torch.full((B,), context, dtype=torch.int32, device=bench.device)
    starts = torch.arange(B + 1, dtype=torch.int32, device=bench.device)

    def walk(one_layer: Callable[[int], Tensor]) -> Step:
        return lambda: torch.stack([one_layer(layer) for layer in range(layers)])

    def ours(layer: int, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
        out = paged_attention(queries[layer], k, v, caches[layer].table, lens, starts, **scales)
        assert isinstance(out, Tensor)
        return out

    ratio = shape.Hv // shape.Hk
    wide_k = [cache.k_cache.repeat_interleave(ratio, 1) for cache in caches]
    small = [_quantised(bench, cache) for cache in caches]
    dense_q = [q[:, :, None] for q in queries]
    dense_k = [cache.k.transpose(1, 2).contiguous() for cache in caches]
    dense_v = [cache.v.transpose(1, 2).contiguous() for cache in caches]
    expanded = [k.repeat_interleave(ratio, 1) for k in dense_k]
    flex = bench.compile(flex_attention)

    def sdpa(backend: SDPBackend, keys: list[Tensor]) -> Step:
        def one_layer(layer: int) -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(dense_q[layer], keys[layer], dense_v[layer], enable_gqa=True)
            return out[:, :, 0]

        return walk(one_layer)

    flops = 4 * B * context * shape.Hq * shape.width * layers
    steps: dict[str, tuple[Step, int, int, float]] = {
        "anabranch": (
            walk(lambda i: ours(i, caches[i].k_cache, caches[i].v_cache)),
            own_bytes * layers, flops, 0.02,
        ),
        "anabranch, int8 cache": (
            walk(lambda i: ours(i, small[i][0], small[i][1], k_scales=small[i][2], v_scales=small[i][3])),
            int8_bytes * layers, flops, INT8_TOLERANCE,
        ),
        "anabranch, GQA twin": (
            walk(lambda i: ours(i, wide_k[i], caches[i].v_cache)), twin_bytes * layers, flops, 0.02,
        ),
        "cuDNN SDPA, unequal heads": (
            sdpa(SDPBackend.CUDNN_ATTENTION, dense_k), own_bytes * layers, flops, 0.02,
        ),
        "cuDNN SDPA, expanded K": (sdpa(SDPBackend.CUDNN_ATTENTION, expanded), twin_bytes * layers, flops, 0.02),
        "flash SDPA, expanded K": (sdpa(SDPBackend.FLASH_ATTENTION, expanded), twin_bytes * layers, flops, 0.02),
        "FlexAttention, expanded K": (
            walk(lambda i: flex(dense_q[i], expanded[i], dense_v[i], enable_gqa=True)[:, :, 0]),
            twin_bytes * layers, flops, 0.02,
        ),
    }  # fmt: skip
    for title, step, read_bytes in flashinfer_steps(bench, shape, queries, caches, wide_k, lens):
        steps[title] = (walk(step), read_bytes * layers, flops, 0.02)
    return Case(name=name, contenders=bench.contenders(name, steps), calls=layers)


def flashinfer_steps(
    bench: Bench, shape: Shape, queries: list[Tensor], caches: list[Cache], wide_k: list[Tensor], lens: Tensor
) -> Iterator[tuple[str, Callable[[int], Tensor], int]]:
    """FlashInfer on K expanded to the V heads, and on V heads side by side as one wide head for each K head."""
    try:
        import flashinfer
    except ImportError:
        bench.absent.append("FlashInfer: not installed")
        return
    B, context = len(lens), int(lens[0])
    pages = -(-context // shape.page)
    indptr = torch.arange(B + 1, dtype=torch.int32, device=bench.device) * pages
    last = torch.full((B,), context - (pages - 1) * shape.page, dtype=torch.int32, device=bench.device)
    element = bench.dtype.itemsize

    space = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)  # the calls run one after another

    def planned(heads: int, v_width: int, layer: int) -> "flashinfer.BatchPrefillWithPagedKVCacheWrapper":
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, kv_layout="HND")
        starts = torch.arange(B + 1, dtype=torch.int32, device=bench.device)
        wrapper.plan(
            starts, indptr, caches[layer].table.flatten(), last, shape.Hq, heads, shape.width, shape.page,
            head_dim_vo=v_width, causal=True, q_data_type=bench.dtype, kv_data_type=bench.dtype,
        )  # fmt: skip
        return wrapper

    ratio = shape.Hv // shape.Hk
    side_by_side = [
        cache.v_cache.unflatten(1, (shape.Hk, ratio)).transpose(2, 3).flatten(3, 4).contiguous() for cache in caches
    ]
    own_head = torch.arange(shape.Hq, device=bench.device) // (shape.Hq // shape.Hv) % ratio
    wrappers: dict[tuple[int, int, int], object] = {}

    def wrapper_of(heads: int, v_width: int, layer: int) -> object:
        key = heads, v_width, layer
        if key not in wrappers:
            wrappers[key] = planned(*key)
        return wrappers[key]

    def expanded(layer: int) -> Tensor:
        wrapper = wrapper_of(shape.Hv, shape.width, layer)
        return wrapper.run(queries[layer], (wide_k[layer], caches[layer].v_cache))  # type: ignore[attr-defined]

    def wide(layer: int) -> Tensor:
        wrapper = wrapper_of(shape.Hk, ratio * shape.width, layer)
        out = wrapper.run(queries[layer], (caches[layer].k_cache, side_by_side[layer]))  # type: ignore[attr-defined]
        columns = out.unflatten(2, (ratio, shape.width))
        return columns.gather(2, own_head[None, :, None, None].expand(B, -1, 1, shape.width))[:, :, 0]

    yield "FlashInfer, expanded K", expanded, shape.cache_bytes(B * context, element, expanded=True)
    yield "FlashInfer, wide V", wide, shape.cache_bytes(B * context, element)


def prefill(bench: Bench, shape: Shape, B: int, tokens: int) -> Case:
    """B whole prompts of `tokens` tokens, nothing cached before."""
    name = f"prefill {shape.Hq}/{shape.Hk}/{shape.Hv} d={shape.width} B={B} T={tokens}"
    cache = make_cache(bench, shape, B, tokens)
    packed = torch.randn(B * tokens, shape.Hq, shape.width, device=bench.device, dtype=bench.dtype)
    lens = torch.full((B,), tokens, dtype=torch.int32, device=bench.device)
    starts = torch.arange(B + 1, dtype=torch.int32, device=bench.device) * tokens
    dense = packed.view(B, tokens, shape.Hq, shape.width)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (dense, cache.k, cache.v))
    ratio = shape.Hv // shape.Hk
    expanded = k.repeat_interleave(ratio, 1)
    flex = bench.compile(flex_attention)
    mask = create_block_mask(lambda b, h, a, j: a >= j, None, None, tokens, tokens, device=str(bench.device))

    def paged() -> Tensor:
        out = paged_attention(packed, cache.k_cache, cache.v_cache, cache.table, lens, starts)
        assert isinstance(out, Tensor)
        return out

    def sdpa(backend: SDPBackend, keys: Callable[[], Tensor]) -> Step:
        def step() -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, keys(), v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(packed.shape)

        return step

    own_bytes = shape.cache_bytes(B * tokens, bench.dtype.itemsize) + 2 * packed.nbytes
    flops = 2 * B * tokens * (tokens + 1) * shape.Hq * shape.width
    steps: dict[str, Step] = {
        "anabranch, paged": paged,
        "anabranch, dense": lambda: attention(dense, cache.k, cache.v).view(packed.shape),
        "cuDNN SDPA, unequal heads": sdpa(SDPBackend.CUDNN_ATTENTION, lambda: k),
        "cuDNN SDPA, K expanded before": sdpa(SDPBackend.CUDNN_ATTENTION, lambda: expanded),
        "flash SDPA, K expanded before": sdpa(SDPBackend.FLASH_ATTENTION, lambda: expanded),
        "flash SDPA, expansion in the clock": sdpa(
            SDPBackend.FLASH_ATTENTION, lambda: k.repeat_interleave(ratio, 1)
        ),
        "FlexAttention, K expanded before": lambda: (
            flex(q, expanded, v, block_mask=mask, enable_gqa=True).transpose(1, 2).reshape(packed.shape)
        ),
    }  # fmt: skip
    timed = {title: (step, own_bytes, flops, 0.02) for title, step in steps.items()}
    return Case(name=name, contenders=bench.contenders(name, timed))


def train(bench: Bench, shape: Shape, B: int, tokens: int) -> Case:
    """Forward and backward of B sequences; the result is all three gradients."""
    name = f"train {shape.Hq}/{shape.Hk}/{shape.Hv} d={shape.width} B={B} T={tokens}"
    make = {"device": bench.device, "dtype": bench.dtype}
    leaves = [
        torch.randn(B, tokens, heads, shape.width, **make).requires_grad_() for heads in (shape.Hq, shape.Hk, shape.Hv)
    ]
    grad = torch.randn(B, tokens, shape.Hq, shape.width, **make)
    ratio = shape.Hv // shape.Hk

    def backward(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(forward(*leaves), leaves, grad)])

    def sdpa(backend: SDPBackend) -> Step:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(ratio, 2), v))
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        return backward(forward)

    own_bytes = 3 * sum(x.nbytes for x in (*leaves, grad))
    flops = 7 * B * tokens * (tokens + 1) * shape.Hq * shape.width  # 2 products forward, 5 backward
    steps = {
        "anabranch": backward(attention),
        "flash SDPA, expansion in the clock": sdpa(SDPBackend.FLASH_ATTENTION),
        "cuDNN SDPA, expansion in the clock": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    timed = {title: (step, own_bytes, flops, 0.02) for title, step in steps.items()}
    return Case(name=name, contenders=bench.contenders(name, timed))


def coordinate(bench: Bench, N: int, D: int) -> list[Case]:
    """The coordinate-wise rules over N float32 vectors of D numbers."""
    found, absent = coordinate_rules(N, D, dtype=torch.float32, device=bench.device)
    bench.absent += absent
    return found


def field_product(bench: Bench, title: str, field: Field, M: int, U: int, L: int) -> Case:
    """[M, U] x [U, L] modulo a 31-bit prime, as shares are encoded, added up and projected; all bits must agree."""
    p = field.p
    matrix, x = (torch.randint(p, shape, device=bench.device, dtype=field.dtype) for shape in ((M, U), (U, L)))

    def by_int64() -> Tensor:
        """Every product is reduced: the sum of two need not fit."""
        left, total = matrix.long(), torch.zeros(M, L, dtype=torch.int64, device=bench.device)
        for u in range(U):
            total.add_(left[:, u : u + 1] * x[u]).remainder_(p)
        return total.to(field.dtype)

    def by_int64_of_few_columns() -> Tensor:
        return torch.stack([(matrix * x[:, c].long()).remainder_(p).sum(1) % p for c in range(L)], 1).to(field.dtype)

    def by_float64() -> Tensor:
        """The upper 15 and the lower 16 bits of the matrix apart: 47 bits a product, so 64 of them are exact."""
        right = x.double()
        high, low = (part.double() @ right for part in (matrix >> 16, matrix & 65535))
        return ((high.long() % p * 65536 + low.long()) % p).to(field.dtype)

    steps = {"anabranch": lambda: multiply(matrix, x, field)}
    steps["torch, int64 and %"] = by_int64_of_few_columns if L < 16 else by_int64
    if U <= 64:
        steps["torch, float64 in halves"] = by_float64
    moved, operations = (M * U + U * L + M * L) * field.bytes, 2 * M * U * L
    timed = {name: (step, moved, operations, 0.0) for name, step in steps.items()}
    name = f"{title} {field.name} [{M}, {U}] x [{U}, {L}]"
    return Case(name=name, contenders=bench.contenders(name, timed))


def medians(bench: Bench, B: int, N: int, D: int, dtype: torch.dtype) -> Iterator[Case]:
    """Gram matrix, combination and median of N rows of D numbers, of which a quarter lies apart; B problems."""
    points = torch.empty(B, N, D, device=bench.device, dtype=dtype)
    for i in range(N):
        points[:, i].normal_().add_(0.5 if i < N // 4 else 0.0)
    centre = points[:, 0]
    a = torch.rand(B, N, device=bench.device, dtype=torch.float64)
    a /= a.sum(1, keepdim=True)
    label = f"B={B} N={N} D={D} {str(dtype).removeprefix('torch.')}"

    def gram() -> Tensor:
        rows = points.float() - centre[:, None].float()
        return rows @ rows.mT

    def weiszfeld() -> Tensor:
        x = points.mean(1, dtype=torch.float32)
        for _ in range(WEISZFELD_STEPS):
            v = 1 / torch.linalg.vector_norm(points.float() - x[:, None], dim=2).clamp_min(1e-6)
            x = ((v / v.sum(1, keepdim=True))[:, :, None] * points.float()).sum(1)
        return x

    timed: dict[str, tuple[int, int, dict[str, Step]]] = {
        "gram": (1, B * N * (N + 1) * D, {
            "anabranch": lambda: centred_gram(points, centre),
            "torch float32": gram,
            "torch.compile float32": bench.compile(gram),
        }),
        "combine": (1, 2 * B * N * D, {
            "anabranch": lambda: combine(points, a, centre),
            "torch": lambda: (a.to(dtype)[:, None] @ points)[:, 0],
        }),
        "median": (2, B * N * (N + 3) * D, {
            "anabranch": lambda: geometric_median(points).point,
            f"torch {WEISZFELD_STEPS} steps": weiszfeld,
            f"torch.compile {WEISZFELD_STEPS} steps": bench.compile(weiszfeld),
        }),
    }  # fmt: skip
    for kind, (reads, flops, steps) in timed.items():
        name = f"{kind} {label}"
        rows = {title: (step, reads * points.nbytes, flops, 0.02) for title, step in steps.items()}
        yield Case(name=name, contenders=bench.contenders(name, rows))
