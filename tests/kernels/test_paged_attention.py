"""Paged attention: the reference against plain attention, every CPU path against the reference, promises bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.native import extension
from anabranch_kernels.paged_attention import cpu, reference
from anabranch_kernels.paged_attention.op import paged_attention

HEADS = [
    (4, 4, 4),
    (8, 2, 2),
    (6, 1, 1),
    (1, 1, 1),
    (32, 4, 16),
    (8, 4, 2),
    (6, 1, 3),
    (12, 4, 3),
    (24, 8, 3),
    (12, 4, 6),
]
WIDTHS = [(16, 16), (8, 24), (24, 8), (5, 3), (1, 1), (33, 48), (64, 64)]
PAGES = [1, 3, 16, 64]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ISAS = extension.supported_isas()
if "avx512" in ISAS:
    ISAS.append("avx512_bf16_emulated")  # the paths of vdpbf16ps, its dot product spelt out
PART = 1024  # csrc/paged_attention.cpp cuts the cache of a decoding sequence into parts of so many tokens
FEW = 16  # and does so up to this many new tokens; above, it cuts the new tokens


def problem(
    sequences, *, heads=(8, 2, 4), widths=(16, 16), page=4, dtype=torch.float32, caches=None, seed=0, unused=torch.nan
):
    """Arguments for sequences of (cached, new) tokens; pages lie in random order, what nobody may read is `unused`."""
    random = torch.Generator().manual_seed(seed)
    pages = [-(-t // page) for t, _ in sequences]
    P = sum(pages) + 2
    order = torch.randperm(P, generator=random, dtype=torch.int32)
    page_table = torch.full((len(sequences), max(pages, default=0) + 1), -1, dtype=torch.int32)
    used = torch.zeros(P, page, dtype=torch.bool)
    for b, (t, _) in enumerate(sequences):
        mine, order = order[: pages[b]], order[pages[b] :]
        page_table[b, : pages[b]] = mine
        used[mine.long()] = (torch.arange(pages[b] * page) < t).view(-1, page)

    def cache(H, D, kind):
        if kind == torch.int8:
            scales = torch.rand(P, H, page, generator=random) * 0.02 + 0.002
            rows = torch.randint(-127, 128, (P, H, page, D), generator=random, dtype=torch.int8)
            return rows, scales.masked_fill(~used[:, None], unused)
        rows = torch.randn(P, H, page, D, generator=random)
        return rows.masked_fill(~used[:, None, :, None], unused).to(kind), None

    k_cache, k_scales = cache(heads[1], widths[0], caches[0] if caches else dtype)
    v_cache, v_scales = cache(heads[2], widths[1], caches[1] if caches else dtype)
    T = sum(n for _, n in sequences)
    return {
        "q": torch.randn(T, heads[0], widths[0], generator=random).to(dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "page_table": page_table,
        "seq_lens": torch.tensor([t for t, _ in sequences], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *(n for _, n in sequences)]).cumsum(0).int(),
        "k_scales": k_scales,
        "v_scales": v_scales,
    }


def arguments(p, *, scale=None, window=None, v_top_k=None, renormalise=False):
    """The same in the order of the op's schema."""
    return (*p.values(), p["q"].shape[2] ** -0.5 if scale is None else scale, window, v_top_k, renormalise)


def exact(p, **options):
    """The reference in float64 from end to end: its result is not rounded to the dtype of q."""
    return reference.paged_attention(*arguments({**p, "q": p["q"].double()}, **options))


def spans(p):
    """(sequence, its rows of q, cached tokens) of every sequence that sees anything."""
    starts = p["cu_seqlens_q"].tolist()
    for b, t in enumerate(p["seq_lens"].tolist()):
        if t and starts[b + 1] > starts[b]:
            yield b, slice(starts[b], starts[b + 1]), t


def expanded(p, name, b, t, dtype):
    """Cached rows of one sequence for every query head, [Hq, t, D], taken from the pages token by token."""
    cache, scales, page = p[f"{name}_cache"], p[f"{name}_scales"], p["k_cache"].shape[2]
    places = [(p["page_table"][b, j // page].item(), j % page) for j in range(t)]
    rows = torch.stack([cache[i, :, slot].to(dtype) for i, slot in places], 1)
    if scales is not None:
        rows = rows * torch.stack([scales[i, :, slot].to(dtype) for i, slot in places], 1)[..., None]
    return rows.repeat_interleave(p["q"].shape[1] // cache.shape[1], 0)


def plain(p, dtype=torch.float64, window=None, scale=None):
    """Attention as textbooks write it, every step in `dtype`, on keys and values expanded to all query heads."""
    T, Hq, Dk = p["q"].shape
    out = torch.zeros(T, Hq, p["v_cache"].shape[3], dtype=dtype)
    for b, rows, t in spans(p):
        k, v = (expanded(p, name, b, t, dtype) for name in "kv")
        n = rows.stop - rows.start
        hidden = torch.ones(n, t, dtype=torch.bool).triu(t - n + 1)
        if window is not None:
            hidden |= torch.ones(n, t, dtype=torch.bool).tril(t - n - window)
        scores = p["q"][rows].to(dtype).transpose(0, 1) @ k.mT * (Dk**-0.5 if scale is None else scale)
        out[rows] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out


def greatest_value(p):
    v = p["v_cache"].double() if p["v_scales"] is None else p["v_cache"].double() * p["v_scales"].double()[..., None]
    return v.nan_to_num(0, 0, 0).abs().max().item()


def assert_near(p, got, wanted):
    """Within eps * max|V|: probabilities and the result are each rounded once to the dtype of q, by eps / 2 at most.

    1e-5 of max|V| on top for sums in float32: the square root of some thousand steps of 2**-24, in scores and values.
    """
    assert got.dtype == p["q"].dtype
    assert got.shape == wanted.shape
    bound = (torch.finfo(got.dtype).eps + 1e-5) * greatest_value(p)
    difference = (got.double() - wanted).abs()
    assert (difference <= bound).all(), (difference.nan_to_num(torch.inf).max(), bound)


def assert_same(got, wanted):
    """Bit by bit, up to the payload of NaN."""
    assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@st.composite
def sequences(draw, most_new=24):
    """Ragged batches: empty ones, padding rows (0 cached), single tokens, chunks on both sides of FEW."""
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        new = draw(st.sampled_from([0, 1, 1, 2, 5, FEW, FEW + 1]) | st.integers(0, most_new))
        before = draw(st.sampled_from([0, 1, 16, 60, 63, 64, 65, 127]) | st.integers(0, 150))  # around tiles of 64
        padding = draw(st.integers(0, 7)) == 0
        pairs.append((0 if padding else before + new, new))
    return pairs


@st.composite
def problems(draw, dtypes=(*FLOATS, torch.int8)):
    return problem(
        draw(sequences()),
        heads=draw(st.sampled_from(HEADS)),
        widths=draw(st.sampled_from(WIDTHS)),
        page=draw(st.sampled_from(PAGES)),
        dtype=draw(st.sampled_from(FLOATS)),
        caches=(draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))),
        seed=draw(st.integers(0, 2**16)),
    )


windows = st.none() | st.sampled_from([1, 2, 7, 64, 2**31 - 1])


@given(problems(), windows, st.sampled_from([None, 0.0, 0.7]))
@settings(max_examples=60)
def test_the_reference_is_plain_attention_on_expanded_heads(p, window, scale):
    assert_close(exact(p, window=window, scale=scale)[0], plain(p, window=window, scale=scale))


@given(problems(), windows, st.sampled_from([None, 0.0, 0.7]))
@settings(max_examples=120)
def test_every_instruction_set_equals_the_reference(p, window, scale):
    wanted, wanted_lse = exact(p, window=window, scale=scale)
    for isa in ISAS:
        got, lse = cpu.paged_attention(*arguments(p, window=window, scale=scale), isa=isa)
        assert_near(p, got, wanted)
        assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)  # sums in float32


@pytest.mark.parametrize("v_kind", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("k_kind", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_keys_and_values_have_their_own_dtypes(dtype, k_kind, v_kind):
    p = problem([(70, 1), (33, 20), (9, 3)], widths=(17, 32), dtype=dtype, caches=(k_kind, v_kind))
    wanted, _ = exact(p)
    for isa in ISAS:
        assert_near(p, cpu.paged_attention(*arguments(p), isa=isa)[0], wanted)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_errs_at_most_twice_as_much_as_plain_attention_in_the_same_dtype(dtype, heads):
    """FlashAttention-2's rule; the floor of 1e-5 is for float32, where both errors are a few roundings."""
    p = problem([(37, 1), (70, 20), (5, 5), (200, 3)], heads=heads, widths=(32, 16), dtype=dtype)
    wanted = plain(p)
    allowed = 2 * (plain(p, dtype).double() - wanted).abs().max() + 1e-5
    for isa in ISAS:
        got = cpu.paged_attention(*arguments(p), isa=isa)[0]
        assert (got.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("new", [1, 5, 20])
def test_each_query_head_reads_its_own_value_head(heads, new):
    Hq, _, Hv = heads
    p = problem([(30, new)], heads=heads)
    p["v_cache"] = torch.arange(Hv, dtype=torch.float32)[:, None, None].expand_as(p["v_cache"]).clone()
    owner = (torch.arange(Hq) // (Hq // Hv)).float()
    # The weights of a row sum to one up to float32 rounding; another head would be off by one.
    assert_close(paged_attention(**p), owner[:, None].expand(new, Hq, 16), rtol=1e-5, atol=1e-5)
    p["seq_lens"], p["cu_seqlens_q"] = torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    p["q"] = p["q"][:1]
    assert_same(paged_attention(**p), owner[:, None].expand(1, Hq, 16))  # one token has weight one


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_each_query_head_reads_its_own_key_head(heads):
    Hq, Hk, _ = heads
    p = problem([(Hk, 1)], heads=heads, widths=(1, 1), page=Hk)
    page = p["page_table"][0, 0]
    p["q"] = torch.full((1, Hq, 1), 1e3)
    p["k_cache"][page] = torch.eye(Hk)[:, :, None]  # token j is bright in head j alone
    p["v_cache"][page] = torch.arange(Hk, dtype=torch.float32)[:, None]
    owner = (torch.arange(Hq) // (Hq // Hk)).float()
    assert_same(paged_attention(**p, scale=1.0)[0, :, 0], owner)  # the other weights are 2**-1443, which is 0


def test_a_constant_added_to_every_key_of_a_head_changes_nothing():
    p = problem([(90, 1), (40, 20)])
    moved = {**p, "k_cache": p["k_cache"] + torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))}
    assert_close(paged_attention(**moved), paged_attention(**p), rtol=1e-5, atol=1e-5)


def test_a_wide_window_is_no_window():
    p = problem([(90, 1), (40, 20)])
    for window in (90, 2**31 - 1, 2**40):
        assert_same(paged_attention(**p, window=window), paged_attention(**p))


@pytest.mark.parametrize("new", [1, FEW, FEW + 1])
def test_a_window_of_one_token_gives_its_value(new):
    p = problem([(75, new)], heads=(4, 2, 4))
    page = p["page_table"][0]
    own = [p["v_cache"][page[j // 4], :, j % 4] for j in range(75 - new, 75)]
    assert_close(paged_attention(**p, window=1), torch.stack(own), rtol=1e-6, atol=0)  # v * (1 / 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"v_top_k": 5}], ids=str)
def test_where_pages_lie_changes_no_bit(dtype, options):
    p = problem([(70, 1), (130, 20), (9, 4)], dtype=dtype)
    wanted = paged_attention(**p, return_lse=True, **options)
    order = torch.randperm(p["k_cache"].shape[0], generator=torch.Generator().manual_seed(1))
    moved = {**p, "k_cache": p["k_cache"][order], "v_cache": p["v_cache"][order]}
    used = p["page_table"] >= 0
    moved["page_table"] = torch.where(used, order.argsort()[p["page_table"].clamp_min(0).long()], -1).int()
    assert_same(paged_attention(**moved, return_lse=True, **options), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_page_size_changes_no_bit(dtype):
    p = problem([(200, 3)], page=200, dtype=dtype)
    wanted = paged_attention(**p)
    for page in (1, 2, 8, 25, 100):
        cut = {**p, "page_table": torch.arange(200 // page, dtype=torch.int32)[None]}
        for name in ("k_cache", "v_cache"):
            rows = p[name][p["page_table"][0, 0]]  # [H, 200, D]
            cut[name] = rows.unflatten(1, (-1, page)).transpose(0, 1).contiguous()
        assert_same(paged_attention(**cut), wanted)


@pytest.mark.parametrize("options", [{}, {"window": 1500}, {"v_top_k": 50}], ids=str)
def test_the_number_of_threads_changes_no_bit(threads, options):
    p = problem([(2 * PART + 300, 1), (PART + 5, 3), (400, 60), (7, 7)], page=64, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(paged_attention(**p, return_lse=True, **options))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"v_top_k": 5}], ids=str)
def test_one_request_does_not_depend_on_its_batch(dtype, options):
    p = problem([(0, 2), (PART + 70, 1), (130, 20), (9, 4), (80, 0), (65, 16)], page=16, dtype=dtype)
    out, lse = paged_attention(**p, return_lse=True, **options)
    for b, rows, _ in spans(p):
        alone = {
            **p,
            "q": p["q"][rows],
            "page_table": p["page_table"][b : b + 1],
            "seq_lens": p["seq_lens"][b : b + 1],
            "cu_seqlens_q": torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        }
        assert_same(paged_attention(**alone, return_lse=True, **options), (out[rows], lse[rows]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 5, 700, PART, PART + 1])
@pytest.mark.parametrize("new", [1, 3])
def test_parts_of_a_long_cache_merge_to_one_pass(kind, window, new):
    """The last rows of a chunk above FEW go through the whole cache in one pass."""
    for t in (PART - 1, PART, PART + 1, PART + 2, 2 * PART, 2 * PART + 1, 2 * PART + 500):
        caches = (kind, kind)
        p = problem([(t, FEW + 1)], heads=(4, 1, 2), widths=(8, 16), page=64, caches=caches, seed=t)
        whole, whole_lse = paged_attention(**p, window=window, return_lse=True)
        few = {**p, "q": p["q"][-new:], "cu_seqlens_q": torch.tensor([0, new], dtype=torch.int32)}
        parts, parts_lse = paged_attention(**few, window=window, return_lse=True)
        # Two orders of the same float32 sum of up to 2548 terms: 50 steps of 2**-24 apart, 3e-6 of max|V|.
        assert_close(parts, whole[-new:], rtol=0, atol=3e-6 * greatest_value(p))
        assert_close(parts_lse, whole_lse[-new:], rtol=0, atol=3e-6)
        assert_near(few, parts, exact(few, window=window)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("boundary", [64, 128, PART])
@pytest.mark.parametrize("widths", [(16, 32), (16, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_tokens_on_both_sides_of_a_boundary_each_see_their_own_past(isa, boundary, widths, dtype):
    """The first of the new tokens see nothing of the last tile or part."""
    for new in (2, 4, 8, FEW, FEW + 1):
        for past in {1, new // 2, new - 1}:
            p = problem([(boundary + past, new)], heads=(4, 2, 4), widths=widths, page=16, dtype=dtype, seed=new)
            assert_near(p, cpu.paged_attention(*arguments(p), isa=isa)[0], exact(p)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("window", [None, 11])
def test_prefill_in_any_chunks_equals_one_shot(dtype, window):
    T = 100
    p = problem([(T, T)], dtype=dtype)
    whole, whole_lse = paged_attention(**p, window=window, return_lse=True)
    assert_near(p, whole, exact(p, window=window)[0])
    for chunks in ([1] * T, [FEW] * 6 + [4], [FEW + 1, 83], [30, 1, 2, 67], [64, 36]):
        out, lse, done = [], [], 0
        for n in chunks:
            chunk = {
                **p,
                "q": p["q"][done : done + n],
                "seq_lens": torch.tensor([done + n], dtype=torch.int32),
                "cu_seqlens_q": torch.tensor([0, n], dtype=torch.int32),
            }
            for results, result in zip(
                (out, lse), paged_attention(**chunk, window=window, return_lse=True), strict=True
            ):
                results.append(result)
            done += n
        assert_near(p, torch.cat(out), whole.double())
        assert_close(torch.cat(lse), whole_lse, rtol=1e-6, atol=1e-6)


def test_decoding_a_token_equals_its_row_of_the_prefill():
    p = problem([(70, 70)])
    rows = paged_attention(**p)
    for t in (1, 2, 4, 5, 64, 65, 70):
        step = {
            **p,
            "q": p["q"][t - 1 : t],
            "seq_lens": torch.tensor([t], dtype=torch.int32),
            "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
        }
        assert_near(p, paged_attention(**step), rows[t - 1 : t].double())


# Selective V: only the most probable positions (section B.2 of arXiv 2501.13629)


def with_ones(p):
    """A last column of ones in V: the result's last column is the mass that was kept."""
    v = p["v_cache"].clone()
    v[..., -1] = 1
    return {**p, "v_cache": v}


@given(problems(dtypes=FLOATS), windows, st.sampled_from([1, 2, 5, 30]), st.booleans())
@settings(max_examples=80)
def test_selection_equals_the_reference(p, window, top, renormalise):
    options = {"window": window, "v_top_k": top, "renormalise": renormalise}
    wanted, wanted_lse = exact(p, **options)
    # Where positions top and top + 1 are closer than float32 rounds, either is right.
    clear = torch.ones(p["q"].shape[:2], dtype=torch.bool)
    for b, rows, t in spans(p):
        n = rows.stop - rows.start
        scores = (
            p["q"][rows].double().transpose(0, 1) @ expanded(p, "k", b, t, torch.float64).mT * p["q"].shape[2] ** -0.5
        )
        hidden = torch.ones(n, t, dtype=torch.bool).triu(t - n + 1)
        if window is not None:
            hidden |= torch.ones(n, t, dtype=torch.bool).tril(t - n - window)
        if top < t:
            high = scores.masked_fill(hidden, -torch.inf).topk(top + 1).values
            clear[rows] = ((high[..., -2] - high[..., -1]) > 1e-4).T | high[..., -1].isinf().T
    for isa in ISAS:
        got, lse = cpu.paged_attention(*arguments(p, **options), isa=isa)
        assert_near(p, torch.where(clear[..., None], got, 0), torch.where(clear[..., None], wanted, 0))
        assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("top", [90, 91, 2**30, 2**31 - 1, 2**40])
def test_selecting_everything_is_dense_attention(top, renormalise):
    p = problem([(90, 1), (40, 20), (0, 1), (1, 1)])
    assert_near(p, paged_attention(**p, v_top_k=top, renormalise=renormalise), paged_attention(**p).double())


@pytest.mark.parametrize("top", [1, 3, 10, 60])
def test_selection_errs_at_most_by_what_it_drops(top):
    p = with_ones(problem([(90, 1), (140, 20)]))
    dense, kept = paged_attention(**p), paged_attention(**p, v_top_k=top)
    renormalised = paged_attention(**p, v_top_k=top, renormalise=True)
    dropped = 1 - kept[..., -1:]
    most = greatest_value(p)
    assert (dropped > 0.01).any()  # or the bound would say nothing
    rounding = 1e-5 * most  # float32 sums
    assert ((kept - dense).abs() <= dropped * most + rounding).all()
    assert ((renormalised - dense).abs() <= 2 * dropped * most + rounding).all()
    assert_close(renormalised, kept / kept[..., -1:], rtol=1e-5, atol=rounding)


def test_selecting_more_keeps_more():
    p = with_ones(problem([(60, 1), (30, 17)]))
    _, dense_lse = paged_attention(**p, return_lse=True)
    before = torch.zeros(18, 8)
    for top in (1, 2, 3, 5, 8, 13, 21, 34, 60):
        out, lse = paged_attention(**p, v_top_k=top, return_lse=True)
        assert (out[..., -1] >= before - 1e-6).all()  # a float32 sum of at most 60 terms
        before = out[..., -1]
        assert_close(lse, dense_lse, rtol=1e-6, atol=1e-6)  # of all positions, whatever is kept
    assert_close(before, torch.ones(18, 8), rtol=1e-6, atol=1e-6)


def test_selection_reads_no_other_value():
    p = problem([(60, 1)], heads=(4, 2, 2), page=60)
    page = p["page_table"][0, 0]
    wanted = paged_attention(**p, v_top_k=6)
    scores = torch.einsum("hd,hjd->hj", p["q"][0], p["k_cache"][page].repeat_interleave(2, 0))
    chosen = torch.zeros(4, 60, dtype=torch.bool).scatter_(1, scores.topk(6).indices, True).view(2, 2, 60).any(1)
    p["v_cache"][page] = torch.where(chosen[..., None], p["v_cache"][page], torch.nan)
    assert_same(paged_attention(**p, v_top_k=6), wanted)


# What is never read, and what must be heard


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"v_top_k": 3}], ids=str)
@pytest.mark.parametrize("caches", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.int8,) * 2], ids=str)
def test_what_lies_in_unused_slots_changes_no_bit(isa, options, caches):
    dtype = torch.bfloat16 if torch.bfloat16 in caches else torch.float32
    results = []
    for unused in (0.0, torch.nan, torch.inf, -torch.inf):
        shapes = [(0, 2), (1, 1), (63, 1), (65, 2), (70, 20)]
        p = problem(shapes, widths=(24, 40), page=16, dtype=dtype, caches=caches, unused=unused)
        results.append(cpu.paged_attention(*arguments(p, **options), isa=isa))
    assert results[0][0].isfinite().all()
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("back_end", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"v_top_k": 3}], ids=str)
def test_padding_rows_are_zero(back_end, options):
    p = problem([(0, 2), (5, 1), (0, 20), (7, 0), (0, 0)])
    out, lse = back_end.paged_attention(*arguments(p, **options))
    padding = torch.ones(23, dtype=torch.bool)
    padding[2] = False
    assert_same(out[padding], torch.zeros(22, 8, 16))
    assert_same(lse[padding], torch.full((22, 8), -torch.inf))
    assert out[2].isfinite().all()
    assert out[2].count_nonzero()


@pytest.mark.parametrize("sequences", [[], [(0, 0)], [(9, 0), (0, 0)]], ids=str)
def test_no_new_tokens_give_nothing(sequences):
    out, lse = paged_attention(**problem(sequences, widths=(16, 24)), return_lse=True)
    assert out.shape == (0, 8, 24)
    assert lse.shape == (0, 8)


def test_a_cache_without_pages_serves_padding():
    p = problem([(0, 3)])
    empty = {name: p[name][:0] for name in ("k_cache", "v_cache")}
    assert_same(paged_attention(**{**p, **empty}), torch.zeros(3, 8, 16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options", [{}, {"window": 50}, {"v_top_k": 3}, {"v_top_k": 3, "renormalise": True}, {"v_top_k": 99}], ids=str
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("new", [1, 20])
def test_a_key_that_is_no_number_spoils_who_sees_it_and_nobody_else(isa, options, bad, new):
    p = problem([(40, new), (30, 2)], heads=(8, 2, 4))
    slot = 40 - new
    p["k_cache"][p["page_table"][0, slot // 4], 1, slot % 4] = bad
    if bad == torch.inf:
        p["q"] = p["q"].abs()  # every score of the key is +inf, and inf - inf is no number
    out, lse = cpu.paged_attention(*arguments(p, **options), isa=isa)
    assert out[:new, 4:].isnan().all()
    assert lse[:new, 4:].isnan().all()
    assert out[:new, :4].isfinite().all()
    assert out[new:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("new", [1, 20])
def test_a_value_that_is_no_number_spoils_who_sees_it_and_nobody_else(isa, new):
    p = problem([(40, new), (30, 2)], heads=(8, 4, 2))
    p["v_cache"][p["page_table"][0, 0], 1, 0, 3] = torch.nan
    out, lse = cpu.paged_attention(*arguments(p), isa=isa)
    assert out[:new, 4:, 3].isnan().all()
    assert out.isnan().sum() == new * 4
    assert lse.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"v_top_k": 2}], ids=str)
def test_scores_far_apart_neither_overflow_nor_vanish(options):
    p = problem([(70, 1), (70, 20)], heads=(2, 1, 1))
    wanted, wanted_lse = exact(p, scale=1e4, **options)
    for isa in ISAS:
        out, lse = cpu.paged_attention(*arguments(p, scale=1e4, **options), isa=isa)
        assert out.isfinite().all()
        # Scores of some 1e5 carry 24 bits: 2**-7 in the exponent of a weight, 1e-2 of it.
        assert_close(lse, wanted_lse, rtol=1e-6, atol=0)
        assert_close(out.double(), wanted, rtol=0, atol=2e-2 * greatest_value(p))


# Layouts


@pytest.mark.parametrize("options", [{}, {"v_top_k": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_tensors_give_the_same_bits(dtype, options):
    p = problem([(70, 1), (40, 20)], widths=(24, 16), dtype=dtype)
    wanted = paged_attention(**p, **options)
    T, Hq, Dk = p["q"].shape

    fused = torch.full((T, Hq * Dk + 100), torch.nan, dtype=dtype)  # q as a slice of q | k | v
    fused[:, : Hq * Dk] = p["q"].flatten(1)
    q = fused[:, : Hq * Dk].view(T, Hq, Dk)
    assert_same(paged_attention(**{**p, "q": q}, **options), wanted)
    assert_same(paged_attention(**{**p, "q": p["q"].mT.contiguous().mT}, **options), wanted)

    P, Hk, page, _ = p["k_cache"].shape
    pool = torch.full((P, 2, Hk, page, 24 + 5), torch.nan, dtype=dtype)  # one layer of several, rows with gaps
    pool[:, 1, ..., :24] = p["k_cache"]
    slots_first = p["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)  # memory order [P, page, Hv, Dv]
    assert_same(paged_attention(**{**p, "k_cache": pool[:, 1, ..., :24], "v_cache": slots_first}, **options), wanted)

    B, pages = p["page_table"].shape
    for table in (torch.stack([p["page_table"]] * 3, 2)[..., 1], p["page_table"].repeat(1, 2)[:, :pages]):
        spread = {name: torch.stack([p[name], p[name] * 7], 1)[:, 0] for name in ("seq_lens", "cu_seqlens_q")}
        assert table.shape == (B, pages)
        assert_same(paged_attention(**{**p, "page_table": table, **spread}, **options), wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"v_top_k": 2}], ids=str)
def test_inputs_are_left_as_they_are(kind, options):
    p = problem([(70, 1), (40, 20), (0, 1)], caches=(kind, kind))
    before = {name: None if x is None else x.clone() for name, x in p.items()}
    paged_attention(**p, **options)
    for name, x in p.items():
        assert_same(x, before[name])


# A torch op


@pytest.mark.parametrize("kind", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"v_top_k": 2, "renormalise": True}], ids=str)
def test_opcheck(kind, options):
    p = problem([(20, 1), (10, 3)], dtype=torch.bfloat16, caches=(kind, kind), unused=0)
    torch.library.opcheck(torch.ops.anabranch.paged_attention.default, arguments(p, **options))


@pytest.mark.parametrize("options", [{}, {"window": 3, "return_lse": True}, {"v_top_k": 2}], ids=str)
def test_compiles_whole(options):
    p = problem([(20, 1), (10, 3)], caches=(torch.int8, torch.bfloat16))
    step = torch.compile(lambda **p: paged_attention(**p, **options), fullgraph=True, backend="aot_eager")
    assert_same(step(**p), paged_attention(**p, **options))


def test_the_fake_tells_shapes_and_dtypes():
    p = problem([(20, 1), (10, 3)], widths=(8, 24), dtype=torch.bfloat16)
    out, lse = paged_attention(**{n: x if x is None else x.to("meta") for n, x in p.items()}, return_lse=True)
    assert (out.shape, out.dtype) == ((4, 8, 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((4, 8), torch.float32)


@pytest.mark.parametrize("name", ["paged_attention", "store_kv"])
def test_devices_without_a_kernel_get_the_reference(name):
    op = f"anabranch::{name}"
    for key in ("CompositeExplicitAutograd", "CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    for key in ("MPS", "XPU", "PrivateUse1"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, key)


# Errors


def change(p, **changes):
    return {name: changes[name](x) if name in changes else x for name, x in p.items()}


def put(*place_and_value):
    *place, value = place_and_value

    def apply(x):
        x = x.clone()
        x[tuple(place)] = value
        return x

    return apply


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": lambda q: q[0]}, r"q must be \[T, Hq, Dk\] .* got \[8, 16\] float32 on cpu"),
        ({"q": lambda q: q.double()}, "q must be .* float32, float16, bfloat16, got .* float64"),
        ({"q": lambda q: q.int()}, "q must be .* got .* int32"),
        ({"q": lambda q: q[..., :8]}, r"same Dk, got q \[4, 8, 8\], k_cache \[10, 2, 4, 16\]"),
        ({"q": lambda q: q[:, :6]}, "multiple of Hk and of Hv, got Hq=6, Hk=2, Hv=4"),
        ({"q": lambda q: q[:, :3]}, "multiple of Hk and of Hv, got Hq=3, Hk=2, Hv=4"),
        ({"q": lambda q: q[:-1]}, "cu_seqlens_q must run from 0 to T=3, got 0 to 4"),
        ({"q": lambda q: q.to("meta")}, "must be on q's device meta, got k_cache on cpu"),
        ({"k_cache": lambda k: k[0]}, r"k_cache must be \[P, Hk, page, Dk\] .* got \[2, 4, 16\]"),
        ({"v_cache": lambda v: v[..., None]}, r"v_cache must be \[P, Hv, page, Dv\] .* got \[10, 4, 4, 16, 1\]"),
        ({"k_cache": lambda k: k.double()}, "k_cache must be .* float32, float16, bfloat16, int8, got .* float64"),
        ({"v_cache": lambda v: v.to(torch.uint8)}, "v_cache must be .* got .* uint8"),
        ({"k_cache": lambda k: k[:, :0]}, r"k_cache must be .* got \[10, 0, 4, 16\]"),
        ({"v_cache": lambda v: v[..., :0]}, r"v_cache must be .* got \[10, 4, 4, 0\]"),
        ({"k_cache": lambda k: k[:, :, :0], "v_cache": lambda v: v[:, :, :0]}, r"got \[10, 2, 0, 16\]"),
        (
            {"k_cache": lambda k: k.mT.contiguous().mT},
            r"k_cache rows must be contiguous, got strides \(128, 64, 1, 4\)",
        ),
        ({"k_cache": lambda k: k[1:]}, "same number of pages and page size, got .*9, 2, 4, 16.* and .*10, 4, 4, 16"),
        ({"v_cache": lambda v: v[:, :, 1:]}, "same number of pages and page size"),
        ({"v_cache": lambda v: v.to("meta")}, "k_cache and v_cache must be on one device, got cpu and meta"),
        (
            {"k_cache": lambda k: k.to(torch.int8)},
            "k_scales goes with an int8 k_cache .* got k_cache torch.int8 .* None",
        ),
        ({"v_cache": lambda v: v.to(torch.int8)}, "v_scales goes with an int8 v_cache"),
        ({"k_scales": lambda _: torch.ones(10, 2, 4)}, "k_scales goes with .* only with it, got k_cache torch.float32"),
        ({"page_table": lambda t: t.long()}, r"page_table \[B, max_pages\] must be int32 .* got \[2, 6\] int64"),
        ({"page_table": lambda t: t[:1]}, r"page_table \[B, max_pages\] must be .* got \[1, 6\]"),
        ({"page_table": lambda t: t[0]}, r"page_table \[B, max_pages\] must be .* got \[6\]"),
        ({"page_table": lambda t: t.to("meta")}, "got page_table on meta"),
        ({"page_table": put(0, 1, 10)}, r"page_table must lie in \[0, P=10\), got \[.*, 10\] at sequence 0"),
        ({"page_table": put(1, 2, -1)}, r"page_table must lie in \[0, P=10\), got \[-1, .*\] at sequence 1"),
        ({"page_table": lambda t: t[:, :3]}, r"max_pages \* page = 12\], got 20 at sequence 0"),
        ({"seq_lens": lambda s: s.long()}, r"seq_lens \[B\] must be int32 .* int64"),
        ({"seq_lens": lambda s: s[None]}, r"seq_lens \[B\] must be int32 .* got \[1, 2\]"),
        ({"seq_lens": lambda s: s[0]}, r"seq_lens \[B\] must be int32 .* got \[\]"),
        ({"seq_lens": lambda s: s.to("meta")}, "got seq_lens on meta"),
        ({"seq_lens": put(0, 25)}, r"seq_lens must lie in \[0, max_pages \* page = 24\], got 25 at sequence 0"),
        ({"seq_lens": put(0, 2**31 - 1)}, "got 2147483647 at sequence 0"),
        ({"seq_lens": put(1, -1)}, "seq_lens must lie in .* got -1 at sequence 1"),
        ({"seq_lens": put(1, 2)}, "seq_lens counts the new tokens too, got 2 with 3 new at sequence 1"),
        ({"cu_seqlens_q": lambda c: c.float()}, r"cu_seqlens_q \[B \+ 1\] must be int32 .* got \[3\] float32"),
        ({"cu_seqlens_q": lambda c: c[1:]}, r"cu_seqlens_q \[B \+ 1\] must be .* got \[2\]"),
        ({"cu_seqlens_q": lambda c: c.to("meta")}, "got cu_seqlens_q on meta"),
        ({"cu_seqlens_q": put(0, 1)}, "cu_seqlens_q must run from 0 to T=4, got 1 to 4"),
        ({"cu_seqlens_q": put(2, 5)}, "cu_seqlens_q must run from 0 to T=4, got 0 to 5"),
        ({"cu_seqlens_q": put(1, 9)}, "cu_seqlens_q must not decrease, got 9 then 4 at sequence 1"),
        ({"cu_seqlens_q": put(1, -(2**31))}, "cu_seqlens_q must not decrease, got 0 then -2147483648 at sequence 0"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x[:40],
)
def test_bad_tensors_are_named(changes, words):
    p = problem([(20, 1), (10, 3)])
    with pytest.raises(ValueError, match=words):
        paged_attention(**change(p, **changes))
    if "lie in" in words or "cu_seqlens_q must" in words:  # the tables are checked below the public function
        with pytest.raises(ValueError, match=words):
            reference.paged_attention(*arguments(change(p, **changes)))


@pytest.mark.parametrize(
    "scales",
    [
        torch.ones(10, 2, 4, dtype=torch.float64),
        torch.ones(10, 2, 3),
        torch.ones(10, 2, 4, 1),
        torch.ones(10, 4, 2).mT,
        torch.ones(10, 2, 4, device="meta"),
    ],
    ids=["dtype", "shape", "rank", "strides", "device"],
)
def test_scales_must_fit_their_cache(scales):
    p = problem([(20, 1), (10, 3)], caches=(torch.int8, torch.int8))
    with pytest.raises(ValueError, match=r"k_scales must be contiguous \[10, 2, 4\] float32 on cpu, got"):
        paged_attention(**{**p, "k_scales": scales})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be at least 1 or None, got 0"),
        ({"window": -3}, "got -3"),
        ({"v_top_k": 0}, "v_top_k must be at least 1 or None, got 0"),
        ({"renormalise": True}, "renormalise has a meaning only with v_top_k"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        paged_attention(**problem([(20, 1)]), **options)


def test_bad_tables_are_found_before_anything_is_computed():
    p = problem([(20, 1), (10, 3)])
    p["page_table"][1, 2] = 2**31 - 1
    for isa in ISAS:
        with pytest.raises(ValueError, match=r"got .* 2147483647"):
            cpu.paged_attention(*arguments(p), isa=isa)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        cpu.paged_attention(*arguments(problem([(20, 1)])), isa="sse9")
