"""Storing keys and values into pages: the right place, torch's rounding, quantisation, and nothing else touched."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.paged_attention import cpu, reference
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BACK_ENDS = pytest.mark.parametrize("back_end", [cpu, reference], ids=["cpu", "reference"])


def caches(P=5, page=4, heads=(2, 3), widths=(8, 6), kinds=(torch.float32, torch.float32), seed=0):
    """k_cache, v_cache, k_scales, v_scales full of old content."""
    random = torch.Generator().manual_seed(seed)
    rows, scales = [], []
    for H, D, kind in zip(heads, widths, kinds, strict=True):
        rows.append((torch.rand(P, H, page, D, generator=random) * 100).to(kind))
        scales.append(torch.rand(P, H, page, generator=random) if kind == torch.int8 else None)
    return *rows, *scales


def tokens(T, heads=(2, 3), widths=(8, 6), dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(T, H, D, generator=random).to(dtype) for H, D in zip(heads, widths, strict=True)]


def store(back_end, k, v, slots, k_cache, v_cache, k_scales=None, v_scales=None):
    back_end.store_kv(k, v, k_cache, v_cache, slots, k_scales, v_scales)


def assert_bits(got, wanted):
    """Equal bit by bit where wanted is a number, and no number where it is none: NaN has many spellings."""
    assert got.dtype == wanted.dtype
    assert torch.equal(got.isnan(), wanted.isnan())
    bits = torch.int32 if wanted.dtype == torch.float32 else torch.int16
    differ = (got.view(bits) != wanted.view(bits)) & ~wanted.isnan()
    assert not differ.any(), (got[differ][:5], wanted[differ][:5])


def converted(rows, kind):
    """Rows [N] as the store leaves them in a cache of another dtype."""
    N = rows.numel()
    width = 64
    padded = torch.nn.functional.pad(rows, (0, -N % width)).view(-1, 1, width)
    T = padded.shape[0]
    cache = torch.zeros(T, 1, 1, width, dtype=kind)
    store_kv(padded, padded, cache, cache.clone(), torch.arange(T))
    return cache.flatten()[:N]


@st.composite
def stores(draw):
    P, page = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 4, 16]))
    heads, widths = (draw(st.tuples(st.integers(1, 4), st.integers(1, 40))) for _ in range(2))
    kinds = tuple(draw(st.sampled_from([*FLOATS, torch.int8])) for _ in range(2))
    slots = draw(st.lists(st.integers(0, P * page - 1), unique=True, max_size=20))
    for _ in range(draw(st.integers(0, 3))):
        slots.insert(draw(st.integers(0, len(slots))), -draw(st.integers(1, 2**40)))
    seed = draw(st.integers(0, 2**16))
    k, v = tokens(len(slots), heads, widths, draw(st.sampled_from(FLOATS)), seed)
    return k, v, torch.tensor(slots, dtype=torch.int64), caches(P, page, heads, widths, kinds, seed)


@given(stores())
@settings(max_examples=100)
def test_tokens_lie_where_their_slots_say_and_nothing_else_changes(problem):
    k, v, slots, pools = problem
    before = [x if x is None else x.clone() for x in pools]
    store_kv(k, v, pools[0], pools[1], slots, k_scales=pools[2], v_scales=pools[3])
    page = pools[0].shape[2]
    for rows, cache, scales, old, old_scales in zip((k, v), pools[:2], pools[2:], before[:2], before[2:], strict=True):
        for t, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            row, place = rows[t].float(), (slot // page, slice(None), slot % page)
            if scales is None:
                old[place] = row.to(cache.dtype)
            else:  # NumPy's float32 arithmetic
                most = np.abs(row.numpy()).max(1)
                scale = most / np.float32(127)
                codes = np.rint(row.numpy() / np.where(scale == 0, np.float32(1), scale)[:, None]).clip(-127, 127)
                old[place], old_scales[place] = torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scale)
        assert torch.equal(cache, old)
        assert scales is None or torch.equal(scales, old_scales)


@given(stores())
@settings(max_examples=60)
def test_the_cpu_equals_the_reference_bit_by_bit(problem):
    k, v, slots, pools = problem
    expected = [x if x is None else x.clone() for x in pools]
    store(cpu, k, v, slots, *pools)
    store(reference, k, v, slots, *expected)
    for got, wanted in zip(pools, expected, strict=True):
        assert got is wanted is None or torch.equal(got, wanted)


def test_what_is_stored_is_attended_to():
    """Each token sees itself alone, so attention gives back the values; float32 all along."""
    T, (k_cache, v_cache, *_) = 20, caches()
    k, v = tokens(T)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    store_kv(k, v, k_cache, v_cache, slots)
    rows = torch.stack([v_cache[slot // 4, :, slot % 4] for slot in slots.tolist()])
    assert torch.equal(rows, v)
    one = {"seq_lens": torch.tensor([20], dtype=torch.int32), "cu_seqlens_q": torch.tensor([0, 20], dtype=torch.int32)}
    store_kv(k, v, k_cache, v_cache, torch.arange(20))
    table = torch.arange(5, dtype=torch.int32)[None]
    out = paged_attention(torch.randn(20, 6, 8), k_cache, v_cache, table, **one, window=1)
    assert_close(out, v.repeat_interleave(2, 1), rtol=1e-6, atol=0)  # v * (1 / 1)


@BACK_ENDS
def test_a_slot_past_the_end_is_refused_and_nothing_is_written(back_end):
    pools = caches(kinds=(torch.int8, torch.float32))
    before = [x if x is None else x.clone() for x in pools]
    for bad in (20, 2**31, 2**62):
        with pytest.raises(ValueError, match=rf"slots must be below P \* page = 20, got {bad}"):
            store(back_end, *tokens(3), torch.tensor([0, -1, bad]), *pools)
    for got, wanted in zip(pools, before, strict=True):
        assert got is wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize("slots", [[], [-1, -(2**62)]], ids=str)
def test_no_tokens_or_only_skipped_ones_write_nothing(slots):
    pools = caches()
    before = [pools[0].clone(), pools[1].clone()]
    store_kv(*tokens(len(slots)), *pools[:2], torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(pools[0], before[0])
    assert torch.equal(pools[1], before[1])


# Conversions round as torch's: to the nearest, ties to even

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 65504.0, 65519.99, 65520.0, 3.4028235e38]


def float32_around(kind):
    """All values of `kind`, all midpoints between neighbours, and what lies one float32 beside both."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind)
    values = bits[bits.isfinite()].float().sort().values
    if kind == torch.bfloat16:  # the sum of two neighbours may overflow float32
        exact = torch.cat([values, values[:-1] / 2 + values[1:] / 2])
    else:
        exact = torch.cat([values, (values[:-1] + values[1:]) / 2])
    above, below = (torch.nextafter(exact, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([exact, above, below, torch.tensor(SPECIAL)])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_float32_is_rounded_as_torch_does(kind):
    rows = float32_around(kind)
    random = torch.randint(-(2**31), 2**31, (2**17,), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, random.int().view(torch.float32)])
    assert_bits(converted(rows, kind), rows.to(kind))


@pytest.mark.parametrize("kind", FLOATS, ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
def test_every_short_float_is_converted_as_torch_does(source, kind):
    rows = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source)
    assert_bits(converted(rows, kind), rows.to(kind))


# Quantisation


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_quantised_values_err_by_at_most_half_a_step(dtype, size):
    if dtype == torch.float16 and size == 1e-30:
        size = 1e-6  # float16 has nothing smaller
    k, v = (x.mul(size).to(dtype) for x in tokens(20))
    k_cache, v_cache, k_scales, v_scales = caches(kinds=(torch.int8, torch.int8))
    store_kv(k, v, k_cache, v_cache, torch.arange(20), k_scales=k_scales, v_scales=v_scales)
    for rows, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        values = (cache.double() * scales.double()[..., None]).transpose(1, 2).flatten(0, 1)
        steps = scales.double().transpose(1, 2).flatten(0, 1)[..., None]
        # Scale and quotient are float32: each moves a quotient of at most 127 by 2**-24 of it.
        assert ((values - rows.double()).abs() <= steps * (0.5 + 127 * 2.0**-23)).all()
        assert (cache.abs().amax(-1) == 127).all()  # the full range is used
        assert_close(steps[..., 0], rows.double().abs().amax(-1) / 127, rtol=2.0**-23, atol=0)


@BACK_ENDS
def test_rows_of_zeros_stay_zeros(back_end):
    pools = caches(kinds=(torch.int8, torch.int8))
    k, v = tokens(20)
    k[3], v[:, 1] = 0, -0.0
    store(back_end, k, v, torch.arange(20), *pools)
    assert not pools[0][0, :, 3].any()
    assert not pools[2][0, :, 3].any()
    assert not pools[1][:, 1].any()
    assert not pools[3][:, 1].any()
    assert pools[2][0, :, 2].all()


def test_quantised_ties_go_to_even():
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]).view(1, 1, 8)
    pools = caches(heads=(1, 1), widths=(8, 8), kinds=(torch.int8, torch.int8))
    store_kv(k, -k, pools[0], pools[1], torch.tensor([5]), k_scales=pools[2], v_scales=pools[3])
    assert pools[0][1, 0, 1].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]
    assert pools[1][1, 0, 1].tolist() == [-127, 0, -2, -2, 0, 2, 2, 127]
    assert pools[2][1, 0, 1] == 1


# Layouts and threads


@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.int8, torch.float16)], ids=str)
def test_strided_tensors_are_read_and_written_in_their_places(kinds):
    T = 6
    k, v = tokens(T)
    slots = torch.tensor([7, -1, 0, 19, 2, 5])
    wanted = caches(kinds=kinds)
    store_kv(k, v, wanted[0], wanted[1], slots, k_scales=wanted[2], v_scales=wanted[3])

    fused = torch.cat([torch.randn(T, 48), k.flatten(1), v.flatten(1)], 1)  # q | k | v
    sliced = fused[:, 48:64].view(T, 2, 8), fused[:, 64:].view(T, 3, 6)
    across = k.mT.contiguous().mT, v.transpose(0, 2).contiguous().transpose(0, 2)
    spread = torch.stack([slots, slots + 1000], 1)[:, 0]
    for new in (sliced, across):
        k_cache, v_cache, k_scales, v_scales = caches(kinds=kinds)
        layers = torch.stack([k_cache, k_cache], 1)  # one layer of several in a pool
        slots_first = v_cache.transpose(1, 2).contiguous().transpose(1, 2)  # memory order [P, page, Hv, Dv]
        store_kv(*new, layers[:, 1], slots_first, spread, k_scales=k_scales, v_scales=v_scales)
        assert torch.equal(layers[:, 1], wanted[0])
        assert torch.equal(layers[:, 0], k_cache)
        assert torch.equal(slots_first, wanted[1])
        for scales, expected in ((k_scales, wanted[2]), (v_scales, wanted[3])):
            assert scales is expected is None or torch.equal(scales, expected)


def test_the_number_of_threads_changes_nothing(threads):
    T = 300
    k, v = tokens(T)
    results = []
    for count in (1, 2):
        threads(count)
        pools = caches(P=75, kinds=(torch.int8, torch.bfloat16))
        store_kv(k, v, pools[0], pools[1], torch.arange(T).flip(0), k_scales=pools[2])
        results.append(pools)
    for one, two in zip(*results, strict=True):
        assert one is two is None or torch.equal(one, two)


# A torch op


@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.int8, torch.int8)], ids=str)
def test_opcheck(kinds):
    k_cache, v_cache, k_scales, v_scales = caches(kinds=kinds)
    op = torch.ops.anabranch.store_kv.default
    torch.library.opcheck(op, (*tokens(3), k_cache, v_cache, torch.tensor([4, -1, 9]), k_scales, v_scales))


def test_the_schema_declares_what_is_written():
    aliases = {a.name: a.alias_info for a in torch.ops.anabranch.store_kv.default._schema.arguments if a.alias_info}
    assert list(aliases) == ["k_cache", "v_cache", "k_scales", "v_scales"]
    assert all(alias.is_write for alias in aliases.values())


def test_compiles_whole_with_the_attention_that_reads_it():
    k, v = tokens(4)
    q = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([6], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    table, slots = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([14, 15, 4, 5])

    def step(k_cache, v_cache):
        store_kv(k, v, k_cache, v_cache, slots)
        return paged_attention(q, k_cache, v_cache, table, *lengths)

    eager, compiled = caches()[:2], caches()[:2]
    wanted = step(*eager)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled), wanted)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": lambda k: k[0]}, r"k must be \[T, 2, 8\] .* got \[2, 8\] float32 on cpu"),
        ({"k": lambda k: k[:, :1]}, r"k must be \[T, 2, 8\] .* to fit its cache \[5, 2, 4, 8\], got \[3, 1, 8\]"),
        ({"v": lambda v: v[..., :5]}, r"v must be \[T, 3, 6\] .* got \[3, 3, 5\]"),
        ({"v": lambda v: v[:2]}, r"v must be \[T, 3, 6\] .* got \[2, 3, 6\]"),
        ({"k": lambda k: k.double()}, "k must be .* float32, float16, bfloat16 .* got .* float64"),
        ({"v": lambda v: v.to(torch.int8)}, "v must be .* got .* int8"),
        ({"k": lambda k: k.to("meta")}, "all tensors must be on one device, got k on meta, slots on cpu"),
        ({"slots": lambda s: s.to("meta")}, "all tensors must be on one device, got k on cpu, slots on meta"),
        ({"slots": lambda s: s.int()}, r"slots must be \[T=3\] torch.int64, got \[3\] int32"),
        ({"slots": lambda s: s[:2]}, r"slots must be \[T=3\] torch.int64, got \[2\] int64"),
        ({"slots": lambda s: s[None]}, r"slots must be \[T=3\] torch.int64, got \[1, 3\]"),
        ({"slots": lambda s: s + 16}, r"slots must be below P \* page = 20, got 20"),
        ({"k_cache": lambda c: c[0]}, r"k_cache must be \[P, Hk, page, Dk\] .* got \[2, 4, 8\]"),
        ({"v_cache": lambda c: c.double()}, "v_cache must be .* float32, float16, bfloat16, int8, got .* float64"),
        ({"v_cache": lambda c: c[:4]}, "same number of pages and page size"),
        ({"k_cache": lambda c: c.mT.contiguous().mT}, "k_cache rows must be contiguous"),
        ({"k_cache": lambda c: c.to(torch.int8)}, "k_scales goes with an int8 k_cache"),
        ({"v_scales": lambda _: torch.ones(5, 3, 4)}, "v_scales goes with an int8 v_cache and only with it"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x[:40],
)
def test_bad_input_is_named(changes, words):
    k, v = tokens(3)
    names = ("k", "v", "k_cache", "v_cache", "slots", "k_scales", "v_scales")
    call = dict(zip(names, (k, v, *caches()[:2], torch.tensor([0, -1, 4]), None, None), strict=True))
    call |= {name: change(call[name]) for name, change in changes.items()}
    before = {name: x.clone() for name, x in call.items() if x is not None}
    with pytest.raises(ValueError, match=words):
        store_kv(**call)
    for name, x in before.items():
        assert x.is_meta or torch.equal(call[name], x)
