"""The Triton kernels of paged attention against the reference; interpreted on a CPU where there is no GPU.

Sizes are tiny because the interpreter is slow; they are chosen to cross every border: tiles, pages, splits, groups.
"""

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.launch import Plan
from anabranch_kernels.paged_attention import reference
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

pytest.importorskip("triton")
from anabranch_kernels.paged_attention import gpu, gpu_decode, gpu_select

# Rows that see nothing have log2(0) and NaN pages stay NaN: NumPy, under the interpreter, warns of both.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    heads=(4, 1, 2),
    widths=(16, 16),
    page=16,
    lengths=(33, 1, 70),
    new=(1, 1, 1),
    dtype=torch.float32,
    k_dtype=None,
    v_dtype=None,
    seed=0,
    max_pages=None,
):
    """Arguments of the op, on the CPU: pages in random order, everything that no token owns is NaN (127 in int8)."""
    (Hq, Hk, Hv), (Dk, Dv), B = heads, widths, len(lengths)
    random = torch.Generator().manual_seed(seed)
    needed = [-(-length // page) for length in lengths]
    P = sum(needed) + 2
    order = torch.randperm(P, generator=random).tolist()
    width = max_pages or max(1, *needed)
    table = torch.full((B, width), 10**6, dtype=torch.int32)  # entries nobody uses name no page
    caches = []
    for H, D, cache_dtype in ((Hk, Dk, k_dtype or dtype), (Hv, Dv, v_dtype or dtype)):
        if cache_dtype == torch.int8:
            cache = torch.full((P, H, page, D), 127, dtype=torch.int8)
            caches.append((cache, torch.full((P, H, page), torch.nan)))
        else:
            caches.append((torch.full((P, H, page, D), torch.nan, dtype=cache_dtype), None))
    taken = 0
    for b, length in enumerate(lengths):
        pages = order[taken : taken + needed[b]]
        taken += needed[b]
        table[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for j in range(length):
            for cache, scales in caches:
                H, _, D = cache.shape[1:]
                row = torch.randn(H, D, generator=random)
                if scales is not None:
                    scale = row.abs().amax(-1) / 127
                    scales[pages[j // page], :, j % page] = scale
                    row = (row / scale[:, None]).round()
                cache[pages[j // page], :, j % page] = row.to(cache.dtype)
    q = torch.randn(sum(new), Hq, Dk, generator=random).to(dtype)
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    (k_cache, k_scales), (v_cache, v_scales) = caches
    lens = torch.tensor(lengths, dtype=torch.int32)
    return [q, k_cache, v_cache, table, lens, starts, k_scales, v_scales, Dk**-0.5]


def on_device(args):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]


def run(args, window=None, v_top_k=None, renormalise=False):
    out, lse = gpu.paged_attention(*on_device(args), window, v_top_k, renormalise)
    return out.cpu(), lse.cpu()


def check(args, tolerance, dtype=torch.float32, **options):
    out, lse = run(args, **options)
    settings = {"window": None, "v_top_k": None, "renormalise": False} | options
    wanted, wanted_lse = reference.paged_attention(*args, *settings.values())
    assert_close(out, wanted, **tolerance(dtype))
    assert_close(lse, wanted_lse, **tolerance(torch.float32))


HEADS = [(4, 1, 2), (4, 1, 4), (6, 3, 2), (4, 4, 2), (3, 1, 1), (2, 2, 2), (4, 2, 4)]


@pytest.mark.parametrize("heads", HEADS)
def test_decode_of_every_head_layout(heads, tolerance):
    check(problem(heads, lengths=(37, 0, 70), new=(1, 1, 1)), tolerance)


@pytest.mark.parametrize("heads", HEADS)
def test_mixed_chunks_of_every_head_layout(heads, tolerance):
    check(problem(heads, lengths=(37, 21, 0), new=(1, 17, 0)), tolerance)


@pytest.mark.parametrize("widths", [(16, 32), (24, 12), (80, 16)])
@pytest.mark.parametrize("new", [(1, 2), (1, 20)])
def test_widths_are_free(widths, new, tolerance):
    check(problem(widths=widths, lengths=(40, 24), new=new), tolerance)


@pytest.mark.parametrize("page", [1, 12, 128])
@pytest.mark.parametrize("new", [(1, 1), (18, 1)])
def test_page_sizes_are_free(page, new, tolerance):
    check(problem(page=page, lengths=(75, 9), new=new), tolerance)


@pytest.mark.parametrize("window", [1, 33, 500])
@pytest.mark.parametrize("new", [(1, 3), (20, 9)])
def test_windows(window, new, tolerance):
    check(problem(lengths=(90, 9), new=new), tolerance, window=window)


@pytest.mark.parametrize("new", [(1, 1), (20, 1)])
@pytest.mark.parametrize(
    ("dtype", "k_dtype", "v_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.int8, torch.int8),
        (torch.float16, torch.int8, torch.float16),
        (torch.float16, torch.float16, torch.int8),
        (torch.float32, torch.int8, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_dtypes_of_query_keys_and_values_are_free(dtype, k_dtype, v_dtype, new, tolerance):
    # An int8 V meets its probabilities in bfloat16 unless the query is float32.
    coarse = torch.bfloat16 if v_dtype == torch.int8 and dtype != torch.float32 else dtype
    args = problem(lengths=(40, 33), new=new, dtype=dtype, k_dtype=k_dtype, v_dtype=v_dtype)
    check(args, tolerance, dtype=coarse)


@pytest.mark.parametrize("lengths", [(100, 7), (64, 33)])
def test_splits_merge_to_one_softmax(lengths, tolerance):
    args = problem((4, 1, 2), lengths=lengths, new=(2, 1), page=32)
    wanted, wanted_lse = reference.paged_attention(*args, None, None, False)
    split = gpu_decode.plan(4, 1, 2, 16, 16, 32, *[torch.float32] * 3, 2, pack=0)
    for most in (1, 2, 8):
        constants = split.constants | {"BLOCK_N": 16, "MIN_SPLIT": 16, "MAX_SPLITS": most}
        tuned = Plan(constants=constants, num_warps=4, num_stages=2)
        out = torch.full(wanted.shape, torch.nan, device=DEVICE)
        lse = torch.full(wanted_lse.shape, torch.nan, device=DEVICE)
        arguments = on_device([*args, gpu.EVERYTHING])
        gpu_decode.decode(*arguments, out, lse, longest=None, tuned=tuned)
        assert_close(out.cpu(), wanted, **tolerance(torch.float32))
        assert_close(lse.cpu(), wanted_lse, **tolerance(torch.float32))


@pytest.mark.parametrize("new", [(1, 1), (18, 2)])
def test_a_sequence_does_not_feel_its_batch(new):
    args = problem(lengths=(25, 200), new=new)
    out, lse = run(args)
    q, k, v, table, lens, starts, *rest = args
    for b in range(2):
        rows = slice(starts[b], starts[b + 1])
        single = torch.tensor([0, new[b]], dtype=torch.int32)
        alone, alone_lse = run([q[rows], k, v, table[b : b + 1], lens[b : b + 1], single, *rest])
        if new[b] <= gpu.SHORT:  # the same kernel takes it, alone or not
            assert torch.equal(out[rows], alone)
            assert torch.equal(lse[rows], alone_lse)
        assert_close(out[rows], alone)


@pytest.mark.parametrize("new", [(1, 1), (18, 1)])
def test_pages_may_lie_anywhere(new):
    args = problem(lengths=(40, 9), new=new)
    P = args[1].shape[0]
    moved = torch.randperm(P, generator=torch.Generator().manual_seed(5))
    there = torch.argsort(moved)
    table = torch.where(args[3] < P, moved[args[3].clamp(max=P - 1).long()].int(), args[3])
    shuffled = [args[0], args[1][there], args[2][there], table, *args[4:]]
    for mine, theirs in zip(run(args), run(shuffled), strict=True):
        assert torch.equal(mine, theirs)


def test_chunked_prefill_equals_one_shot():
    q, k, v, table, _, _, *rest = problem(lengths=(30,), new=(30,))
    whole, whole_lse = run([q, k, v, table, torch.tensor([30]).int(), torch.tensor([0, 30]).int(), *rest])
    for chunk in (11, 20):
        for begin in range(0, 30, chunk):
            end = min(begin + chunk, 30)
            cut = [q[begin:end], k, v, table, torch.tensor([end]).int(), torch.tensor([0, end - begin]).int(), *rest]
            out, lse = run(cut)
            assert_close(out, whole[begin:end])
            assert_close(lse, whole_lse[begin:end])


@pytest.mark.parametrize(("new", "bad"), [((1, 1, 1), -1), ((1, 1, 1), 2**31 - 1), ((17, 5, 1), -(2**31))])
def test_a_page_that_does_not_exist_gives_nan_to_those_who_need_it(new, bad, tolerance):
    args = problem(lengths=(40, 20, 33), new=new)
    _, wanted_lse = reference.paged_attention(*args, None, None, False)
    args[3] = args[3].clone()
    args[3][1, 0] = bad
    starts = args[5].tolist()
    for options in ({}, {"v_top_k": 5}):
        out, lse = run(args, **options)
        rows = slice(starts[1], starts[2])
        assert out[rows].isnan().all()
        assert lse[rows].isnan().all()
        others = [*range(starts[1]), *range(starts[2], starts[3])]
        assert_close(lse[others], wanted_lse[others], **tolerance(torch.float32))
        assert out[others].isfinite().all()


@pytest.mark.parametrize("new", [(1, 1), (20, 1)])
def test_a_length_over_the_table_gives_nan(new):
    args = problem(lengths=(30, 20), new=new)
    args[4] = torch.tensor([2**31 - 1, 20], dtype=torch.int32)
    out, _ = run(args)
    assert out[: new[0]].isnan().all()
    assert out[new[0] :].isfinite().all()


@pytest.mark.parametrize("T", [3, 20])
def test_rows_of_no_sequence_are_zero(T):
    args = problem(lengths=(20, 9), new=(1, T - 1))
    args[5] = torch.tensor([0, 1, T - 1], dtype=torch.int32)
    for options in ({}, {"v_top_k": 5}):
        out, lse = run(args, **options)
        assert not out[T - 1 :].any()
        assert (lse[T - 1 :] == -torch.inf).all()
        assert out[: T - 1].any()


@pytest.mark.parametrize("starts", [[-5, 1, 2], [0, 2, 1], [0, 1000, 2], [1, 1, 1], [7, 9, 11]])
def test_nonsense_in_the_row_starts_is_survived(starts):
    args = problem(lengths=(20, 9), new=(1, 1))
    args[5] = torch.tensor(starts, dtype=torch.int32)
    for options in ({}, {"v_top_k": 5}):
        out, _ = run(args, **options)
        assert out.shape == args[0].shape


@pytest.mark.parametrize("heads", [(4, 1, 2), (6, 3, 2)])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("v_top_k", [1, 6, 1000])
def test_selective_v(heads, renormalise, v_top_k, tolerance):
    args = problem(heads, widths=(16, 24), lengths=(33, 4, 0), new=(3, 1, 1))
    check(args, tolerance, v_top_k=v_top_k, renormalise=renormalise)


@pytest.mark.parametrize("window", [None, 9])
def test_selective_v_of_int8_pages(window, tolerance):
    args = problem(lengths=(40, 20), new=(2, 1), k_dtype=torch.int8, v_dtype=torch.int8)
    check(args, tolerance, v_top_k=5, window=window)


def test_selective_v_in_portions(monkeypatch, tolerance):
    monkeypatch.setattr(gpu_select, "BUFFER", 4 * 4 * 48 * 2)  # two rows at a time
    check(problem(lengths=(40, 20), new=(3, 2)), tolerance, v_top_k=5)


def test_a_strided_query(tolerance):
    args = problem(lengths=(30, 22), new=(2, 17))
    packed = torch.randn(19, 4 + 1 + 2, 16)
    args[0] = packed[:, :4]
    check(args, tolerance)
    args[0] = packed[:, :4].transpose(1, 2).contiguous().transpose(1, 2)
    check(args, tolerance)


@pytest.mark.parametrize(
    ("dtype", "k_dtype", "v_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float32, torch.int8, torch.int8),
        (torch.bfloat16, torch.int8, torch.bfloat16),
    ],
)
def test_store_writes_what_the_reference_writes(dtype, k_dtype, v_dtype):
    random = torch.Generator().manual_seed(0)
    T, P, page = 7, 4, 8
    slots = torch.tensor([3, 31, -1, 8, P * page + 5, 0, 17])
    new, both = [], []
    for H, D, cache_dtype in ((2, 16, k_dtype), (3, 20, v_dtype)):
        rows = torch.randn(T, H + 1, D, generator=random).to(dtype)[:, :H]  # strided
        if DEVICE == "cpu" and cache_dtype == torch.bfloat16:
            rows = rows.bfloat16().to(dtype)  # the interpreter cuts bits off where a GPU rounds
        rows[0] = 0  # a row without a scale
        new.append(rows)
        cache = torch.randint(-9, 9, (P, H, page, D), generator=random).to(cache_dtype)
        both.append((cache, torch.zeros(P, H, page) if cache_dtype == torch.int8 else None))
    (k_cache, k_scales), (v_cache, v_scales) = both
    wanted = [None if x is None else x.clone() for x in (k_cache, v_cache, k_scales, v_scales)]
    got = on_device([None if x is None else x.clone() for x in wanted])
    kept = slots < P * page  # the reference refuses the slot that a GPU skips
    reference.store_kv(*(x[kept] for x in new), *wanted[:2], slots[kept], *wanted[2:])
    gpu.store_kv(*on_device(new), *got[:2], slots.to(DEVICE), *got[2:])
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is theirs is None or torch.equal(mine.cpu(), theirs)


def test_empty_calls():
    args = problem(lengths=(3,), new=(1,))
    none = [args[0][:0], *args[1:5], torch.tensor([0, 0]).int(), *args[6:]]
    assert run(none)[0].shape == (0, 4, 16)
    out, lse = run([*args[:3], args[3][:0], args[4][:0], torch.tensor([0]).int(), *args[6:]])
    assert not out.any()
    assert (lse == -torch.inf).all()


SIGMA = (32, 4, 16)  # heads of Sigma's layers


def large(heads, widths, lengths, new, dtype, page=64, extra_pages=0, seed=0):
    """Arguments of the public op on the GPU, made there: random caches, pages in random order."""
    (Hq, Hk, Hv), (Dk, Dv), B = heads, widths, len(lengths)
    random = torch.Generator(DEVICE).manual_seed(seed)
    width = -(-max(lengths) // page)
    P = B * width + extra_pages
    make = {"generator": random, "device": DEVICE, "dtype": dtype}
    q = torch.randn(sum(new), Hq, Dk, **make)
    k_cache, v_cache = torch.randn(P, Hk, page, Dk, **make), torch.randn(P, Hv, page, Dv, **make)
    table = torch.randperm(P, generator=random, device=DEVICE)[-B * width :].view(B, width).int()
    starts = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    return [q, k_cache, v_cache, table, torch.tensor(lengths, device=DEVICE).int(), starts]


def close_to_reference(args, tolerance, dtype, **options):
    out, lse = paged_attention(*args, return_lse=True, **options)
    rest = (options.get("k_scales"), options.get("v_scales"), args[0].shape[2] ** -0.5)
    settings = (options.get("window"), options.get("v_top_k"), False)
    wanted, wanted_lse = reference.paged_attention(*args, *rest, *settings)
    assert_close(out, wanted, **tolerance(dtype))
    assert_close(lse, wanted_lse, **tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("heads", [SIGMA, (32, 8, 8), (24, 8, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [((5000, 1, 777), (1, 1, 1)), ((3000, 640, 2, 900), (1, 640, 2, 300)), ((130, 129), (4, 129))],
)
def test_on_the_gpu_real_shapes(heads, widths, dtype, lengths, new, tolerance):
    args = large(heads, widths, lengths, new, dtype)
    close_to_reference(args, tolerance, dtype)
    close_to_reference(args, tolerance, dtype, window=200)
    close_to_reference(args, tolerance, dtype, v_top_k=50)


@pytest.mark.gpu
@pytest.mark.parametrize("new", [(1, 1), (1, 700)])
def test_on_the_gpu_int8_pages_that_our_store_filled(new, tolerance):
    q, k, v, *tables = large(SIGMA, (128, 128), (4000, 900), new, torch.bfloat16)
    slots = torch.arange(k.shape[0] * k.shape[2], device=DEVICE)
    caches, scales = [x.to(torch.int8) for x in (k, v)], [torch.empty(x.shape[:3], device=DEVICE) for x in (k, v)]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (k, v)]
    store_kv(*rows, *caches, slots, k_scales=scales[0], v_scales=scales[1])
    wanted = [x.clone() for x in (*caches, *scales)]
    reference.store_kv(*rows, *wanted[:2], slots, *wanted[2:])
    for mine, theirs in zip((*caches, *scales), wanted, strict=True):
        assert torch.equal(mine, theirs)
    close_to_reference([q, *caches, *tables], tolerance, torch.bfloat16, k_scales=scales[0], v_scales=scales[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_gpu_the_store_rounds_to_nearest(dtype):
    k, v = torch.randn(300, 4, 64, device=DEVICE), torch.randn(300, 16, 96, device=DEVICE) * 1e4
    caches = [torch.zeros(10, x.shape[1], 32, x.shape[2], dtype=dtype, device=DEVICE) for x in (k, v)]
    slots = torch.randperm(320, device=DEVICE)[:300]
    wanted = [x.clone() for x in caches]
    store_kv(k, v, *caches, slots)
    reference.store_kv(k, v, *wanted, slots, None, None)
    for mine, theirs in zip(caches, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("new", [(1, 1, 1), (1, 150, 9)])
def test_on_the_gpu_two_runs_agree_bit_for_bit(new):
    args = large(SIGMA, (64, 64), (20000, 150, 4000), new, torch.bfloat16)
    first = paged_attention(*args, return_lse=True)
    for _ in range(20):
        for mine, theirs in zip(paged_attention(*args, return_lse=True), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"v_top_k": 20}])
@pytest.mark.parametrize("rows", [3, 40])
def test_on_the_gpu_a_graph_follows_new_lengths_and_pages(rows, options):
    args = large(SIGMA, (64, 64), (3000, 500, 100), (1, 1, rows - 2), torch.bfloat16)
    q, k, v, table, lens, starts = args
    paged_attention(*args, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*args, **options)
    q.copy_(torch.randn_like(q))
    table.copy_(table.flip(0))
    lens.copy_(torch.tensor([37, 2999, 1500]))
    starts.copy_(torch.tensor([0, 0, 1, rows]) if rows == 3 else torch.tensor([0, 1, 30, 38]))
    graph.replay()
    again = paged_attention(*args, **options)
    assert torch.equal(out, again)
    covered = int(starts[-1])
    wanted, _ = reference.paged_attention(
        q[:covered], k, v, table, lens, starts, None, None, 0.125, None, options.get("v_top_k"), False
    )
    assert_close(again[:covered], wanted, atol=2.0**-6, rtol=2.0**-6)  # bfloat16, as in conftest


@pytest.mark.gpu
def test_on_the_gpu_offsets_beyond_32_bits(tolerance):
    extra = (2**31 + 2**24) // (4 * 64 * 64)  # pages that push the used ones past 2**31 elements
    q, k, v, table, lens, starts = large((8, 4, 4), (64, 64), (500, 90), (1, 90), torch.bfloat16, extra_pages=extra)
    P = k.shape[0]
    table.copy_(torch.arange(P - table.numel(), P).view_as(table))
    close_to_reference([q, k, v, table, lens, starts], tolerance, torch.bfloat16)
    slots = torch.arange(P * 64 - 80, P * 64, device=DEVICE)
    rows = torch.randn(80, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    store_kv(rows, rows, k, v, slots)
    assert torch.equal(k[-1], rows[-64:].transpose(0, 1))


@pytest.mark.gpu
def test_on_the_gpu_opcheck_and_compile():
    args = large((4, 1, 2), (16, 16), (33, 20), (1, 20), torch.float16, page=16)
    torch.library.opcheck(torch.ops.anabranch.paged_attention.default, (*args, None, None, 0.25, None, None, False))
    compiled = torch.compile(lambda *x: paged_attention(*x) * 2, fullgraph=True)
    assert_close(compiled(*args), paged_attention(*args) * 2)
