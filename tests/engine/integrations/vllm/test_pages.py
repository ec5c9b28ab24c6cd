"""vLLM's pages as ours: as many bytes as K and V have, and what is written is what is attended to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.integrations.vllm.pages import own_columns, page_views, wide_v
from anabranch_kernels.paged_attention.op import paged_attention, store_kv


def cache_of(P, Hk, page, columns, *, order, layers=1, dtype=torch.float32):
    """One layer's [P, Hk, page, columns] as vLLM makes it: heads or tokens outermost in a page, layers apart or not."""
    sizes = (P, layers, Hk, page, columns) if order == "heads" else (P, layers, page, Hk, columns)
    cache = torch.full(sizes, torch.nan, dtype=dtype)[:, layers - 1]
    return cache if order == "heads" else cache.transpose(1, 2)


@given(*(st.integers(1, 6) for _ in range(4)))
def test_wide_v_keeps_as_many_elements_as_k_and_v_have(Hk, r, Dk, Dv):
    assert Hk * (Dk + wide_v(Hk, r * Hk, Dv)) == Hk * Dk + r * Hk * Dv


@pytest.mark.parametrize(("k_heads", "v_heads"), [(4, 6), (4, 2), (0, 4)])
def test_wide_v_needs_a_whole_number_of_v_heads_for_each_k_head(k_heads, v_heads):
    with pytest.raises(ValueError, match=f"got k_heads={k_heads}, v_heads={v_heads}"):
        wide_v(k_heads, v_heads, 64)


@pytest.mark.parametrize("order", ["heads", "tokens"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_views_fill_the_pages_exactly_once(order, layers):
    cache = cache_of(5, 2, 4, 16 + 2 * 24, order=order, layers=layers)
    k, v = page_views(cache, 16, 4)
    assert (k.shape, v.shape) == ((5, 2, 4, 16), (5, 4, 4, 24))
    cache.zero_()
    k += 1
    v += 1
    assert (cache == 1).all()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


@pytest.mark.parametrize("order", ["heads", "tokens"])
@pytest.mark.parametrize(("Hq", "Hk", "Hv"), [(8, 2, 4), (8, 4, 4), (6, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_attended_to(order, Hq, Hk, Hv, dtype, tolerance):
    random, page, Dk, Dv = torch.Generator().manual_seed(0), 4, 16, 24
    lengths, table = [9, 4, 1], torch.tensor([[7, 0, 3], [2, -1, -1], [5, -1, -1]], dtype=torch.int32)
    q = torch.randn(3, Hq, Dk, generator=random, dtype=torch.float64).to(dtype)  # the last token of each
    keys, values = (
        [torch.randn(n, H, D, generator=random, dtype=torch.float64).to(dtype) for n in lengths]
        for H, D in ((Hk, Dk), (Hv, Dv))
    )
    k_pages, v_pages = page_views(cache_of(8, Hk, page, Dk + wide_v(Hk, Hv, Dv), order=order, dtype=dtype), Dk, Hv)
    slots = [int(table[b, p // page]) * page + p % page for b, n in enumerate(lengths) for p in range(n)]
    store_kv(torch.cat(keys), torch.cat(values), k_pages, v_pages, torch.tensor(slots))
    one_each = torch.arange(4, dtype=torch.int32)
    out = paged_attention(q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32), one_each)
    for b in range(3):
        k, v = (x.double().repeat_interleave(Hq // x.shape[1], 1) for x in (keys[b], values[b]))
        p = (torch.einsum("hd,shd->hs", q[b].double(), k) / Dk**0.5).softmax(-1)
        assert_close(out[b].double(), torch.einsum("hs,shd->hd", p, v), **tolerance(dtype))


@pytest.mark.parametrize(
    ("cache", "k_dim", "v_heads", "message"),
    [
        (torch.zeros(3, 2, 40), 16, 2, "cache must be"),
        (torch.zeros(3, 2, 4, 40), 16, 3, "no 3 V heads fit"),
        (torch.zeros(3, 2, 4, 40), 40, 2, "with 40 columns of K"),
        (torch.zeros(3, 2, 4, 41), 16, 4, "no 4 V heads fit"),
        (torch.zeros(3, 2, 4, 80)[..., ::2], 16, 2, "must lie in one piece"),
        (torch.zeros(2, 3, 4, 40).transpose(0, 1), 16, 2, "must lie in one piece"),  # heads outside the pages
    ],
)
def test_other_caches_are_refused(cache, k_dim, v_heads, message):
    with pytest.raises(ValueError, match=message):
        page_views(cache, k_dim, v_heads)


@pytest.mark.parametrize(("Hq", "Hk", "Hv"), [(12, 2, 6), (4, 4, 4), (8, 1, 4)])
def test_own_columns_are_those_of_the_heads_own_values(Hq, Hk, Hv):
    """A kernel that knows wide heads only fills all columns with p_i V; ours must agree on those it calls its own."""
    S, Dv, r = 5, 3, Hv // Hk
    p, v = torch.rand(2, Hq, S), torch.randn(2, S, Hv, Dv)
    wide_heads = v.reshape(2, S, Hk, r * Dv).repeat_interleave(Hq // Hk, 2)
    wide = torch.einsum("ths,tshd->thd", p, wide_heads)
    wanted = torch.einsum("ths,tshd->thd", p, v.repeat_interleave(Hq // Hv, 2))
    assert_close(own_columns(wide, Hk, Hv).reshape(2, Hq, Dv), wanted)
    own_columns(wide, Hk, Hv).zero_()
    assert (wide == 0).sum() == 2 * Hq * Dv  # a view: what is written to it is written to the output
