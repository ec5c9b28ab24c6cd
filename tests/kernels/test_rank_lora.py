"""Adapters with routed ranks: properties, the loop of the papers, back-ends against the reference, edges."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.native import extension
from anabranch_kernels.rank_lora import cpu, reference
from anabranch_kernels.rank_lora.op import GATES, Adapter, FusedAdapters, add_rank_lora, rank_lora, table_of

D, O = 24, 20
ROUTED = GATES[1:]
ISAS = extension.supported_isas()


def weights(R: int, G: int, *, dtype=torch.float64, seed: int = 0):
    """a, b, router, bias of R ranks and G blocks."""
    random = torch.Generator().manual_seed(seed)
    a, b, router = (torch.randn(n, w, generator=random, dtype=torch.float64) for n, w in ((R, D), (R, O), (G, D)))
    return a.to(dtype), b.to(dtype), router.to(dtype), 0.05 * torch.randn(G, generator=random)


def tokens(T: int, *, dtype=torch.float64, seed: int = 1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one(T: int):
    return torch.zeros(T, dtype=torch.int32)


def by_the_formula(x, a, b, router, bias, adapter: Adapter):
    """Token by token and block by block, with Python's sorting."""
    block = adapter.ranks // adapter.rows
    out = torch.zeros(len(x), b.shape[1], dtype=torch.float64)
    for t, row in enumerate(x):
        logits = [float(row @ router[adapter.first_row + g]) for g in range(adapter.rows)]
        p = logits if adapter.gate == "softmax_topk" else [1 / (1 + 2.718281828459045**-v) for v in logits]
        z = [v + float(bias[adapter.first_row + g]) for g, v in enumerate(p)]
        picked = sorted(sorted(range(adapter.rows), key=lambda g: (-z[g], g))[: adapter.chosen])
        if adapter.gate == "softmax_topk":
            e = [2.718281828459045 ** z[g] for g in picked]
        else:
            e = [p[g] if adapter.gate.endswith("unbiased") else max(z[g], 2.0**-20) for g in picked]
        for g, gate in zip(picked, e, strict=True):
            for i in range(adapter.first_rank + g * block, adapter.first_rank + (g + 1) * block):
                out[t] += adapter.scale * gate / sum(e) * (row @ a[i]) * b[i]
    return out


@pytest.mark.parametrize("rows", [12, 4, 3])
@pytest.mark.parametrize("gate", ROUTED)
def test_it_is_the_formula(gate, rows):
    adapter = Adapter(first_rank=2, ranks=12, first_row=1, rows=rows, chosen=2, gate=gate, scale=1.5)
    w = weights(16, rows + 2)
    x = tokens(9)
    routed = rank_lora(x, *w, table_of([adapter]), one(9))
    assert_close(routed.y, by_the_formula(x, *w, adapter), rtol=1e-12, atol=1e-12)


def test_all_ranks_at_constant_gates_are_plain_lora():
    a, b, router, bias = weights(8, 0)
    x = tokens(5)
    lora = rank_lora(x, a, b, router, bias, table_of([Adapter(first_rank=0, ranks=8, scale=16 / 8)]), one(5))
    assert_close(lora.y, 2 * (x @ a.T) @ b, rtol=1e-12, atol=1e-12)
    # A router that knows nothing and picks everything gives each rank 1/r: LoRA with alpha / r.
    even = Adapter(first_rank=0, ranks=8, rows=8, chosen=8, gate="sigmoid_renorm", scale=16.0)
    same = rank_lora(x, a, b, torch.zeros(8, D, dtype=x.dtype), torch.zeros(8), table_of([even]), one(5))
    assert_close(same.y, lora.y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ROUTED)
def test_zero_b_adds_exactly_nothing(gate):
    a, b, router, bias = weights(8, 8)
    adapter = Adapter(first_rank=0, ranks=8, rows=8, chosen=3, gate=gate)
    assert not rank_lora(tokens(4), a, b * 0, router, bias, table_of([adapter]), one(4)).y.any()


@pytest.mark.parametrize("gate", ROUTED)
def test_the_order_of_ranks_does_not_matter(gate):
    a, b, router, bias = weights(10, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    table = table_of([Adapter(first_rank=0, ranks=10, rows=10, chosen=4, gate=gate)])
    x = tokens(6)
    there = rank_lora(x, a, b, router, bias, table, one(6)).y
    assert_close(rank_lora(x, a[order], b[order], router[order], bias[order], table, one(6)).y, there)


@pytest.mark.parametrize("gate", ROUTED)
def test_a_block_of_ranks_is_a_small_adapter_of_a_mixture(gate):
    """Multi-LoRA with one gate an expert equals one adapter with a block-constant diagonal gate."""
    E, q = 4, 3
    a, b, router, bias = weights(E * q, E)
    adapter = Adapter(first_rank=0, ranks=E * q, rows=E, chosen=2, gate=gate)
    x = tokens(7)
    routed = rank_lora(x, a, b, router, bias, table_of([adapter]), one(7))
    picked, gates = reference.route(x @ router.T, bias.double(), 2, GATES.index(gate))
    experts = torch.stack([(x @ a[e * q : e * q + q].T) @ b[e * q : e * q + q] for e in range(E)], 1)
    mixture = (experts.gather(1, picked[:, :, None].expand(-1, -1, O)) * gates[:, :, None]).sum(1)
    assert (routed.y - mixture).abs().max() < 1e-12


@pytest.mark.parametrize("gate", ROUTED)
def test_gates_are_a_distribution_over_what_was_picked(gate):
    a, b, router, bias = weights(16, 16)
    bias = bias * 20  # biases that would make sigmoid scores negative
    adapter = Adapter(first_rank=0, ranks=16, rows=16, chosen=5, gate=gate)
    routed = rank_lora(tokens(50), a, b, router, bias, table_of([adapter]), one(50))
    assert (routed.gates > 0).all()
    assert_close(routed.gates.sum(1), torch.ones(50, dtype=torch.float64))
    assert (routed.picked.diff(dim=1) > 0).all()
    assert routed.counts.sum() == 50 * 5
    assert_close(routed.counts, routed.picked.flatten().bincount(minlength=16))


def test_ties_go_to_the_lowest_index():
    a, b, _, _ = weights(6, 6)
    adapter = Adapter(first_rank=0, ranks=6, rows=6, chosen=2, gate="softmax_topk")
    routed = rank_lora(tokens(3), a, b, torch.zeros(6, D, dtype=a.dtype), torch.zeros(6), table_of([adapter]), one(3))
    assert routed.picked.tolist() == [[0, 1]] * 3


MIXED = [
    Adapter(first_rank=5, ranks=8, first_row=2, rows=8, chosen=3, gate="sigmoid_renorm", scale=4.0),
    Adapter(first_rank=0, ranks=5, scale=0.5),
    Adapter(first_rank=13, ranks=6, first_row=10, rows=3, chosen=1, gate="softmax_topk", scale=2.0),
    Adapter(first_rank=19, ranks=0),
    Adapter(first_rank=19, ranks=4, first_row=0, rows=2, chosen=2, gate="sigmoid_renorm_unbiased"),
]


def test_a_mixed_batch_is_a_loop_over_adapters_in_any_order():
    w = weights(23, 13)
    x = tokens(40)
    adapter_of = torch.randint(-1, len(MIXED), (40,), generator=torch.Generator().manual_seed(5)).int()
    table = table_of(MIXED)
    mixed = rank_lora(x, *w, table, adapter_of)
    for index, adapter in enumerate(MIXED):
        mine = adapter_of == index
        alone = rank_lora(x[mine], *w, table_of([adapter]), one(int(mine.sum())))
        assert_close(mixed.y[mine], alone.y)
        assert_close(mixed.picked[mine][:, : adapter.chosen], alone.picked)
    assert not mixed.y[adapter_of < 0].any()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    again = rank_lora(x[order], *w, table, adapter_of[order])
    assert torch.equal(again.y, mixed.y[order])
    assert torch.equal(again.counts, mixed.counts)


def test_gradients_are_those_of_the_formula():
    w = weights(23, 13)
    x = tokens(12)
    adapter_of = torch.tensor([0, 1, 2, 3, 4, -1] * 2, dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (x, *w[:3])]
    assert torch.autograd.gradcheck(lambda *t: rank_lora(*t, w[3], table_of(MIXED), adapter_of).y, leaves)


@pytest.mark.parametrize("gate", ROUTED)
def test_ranks_that_nobody_picked_get_no_gradient(gate):
    a, b, router, bias = weights(32, 32)
    adapter = Adapter(first_rank=0, ranks=32, rows=32, chosen=2, gate=gate)
    leaves = [t.requires_grad_() for t in (a, b)]
    routed = rank_lora(tokens(4), a, b, router, bias, table_of([adapter]), one(4))
    routed.y.square().sum().backward()
    idle = routed.counts == 0
    assert idle.any()
    assert not any(leaf.grad[idle].any() for leaf in leaves)
    assert all(leaf.grad[~idle].any(1).all() for leaf in leaves)


def test_nothing_to_do_is_done():
    a, b, router, bias = weights(4, 0)
    assert rank_lora(tokens(0), a, b, router, bias, table_of([Adapter(first_rank=0, ranks=4)]), one(0)).y.shape == (
        0,
        O,
    )
    x = tokens(2).requires_grad_()
    routed = rank_lora(x, a, b, router, bias, table_of([]), one(2) - 1)
    routed.y.sum().backward()
    assert not routed.y.any()
    assert not x.grad.any()


def test_what_does_not_fit_is_refused():
    a, b, router, bias = weights(4, 4)
    table = table_of([Adapter(first_rank=0, ranks=4, rows=4, chosen=2, gate="softmax_topk")])
    with pytest.raises(ValueError, match=r"x must be \[T, D\]"):
        rank_lora(tokens(2)[0], a, b, router, bias, table, one(2))
    with pytest.raises(ValueError, match=r"a must be \[4, 24\] torch.float64"):
        rank_lora(tokens(2), a.float(), b, router, bias, table, one(2))
    with pytest.raises(ValueError, match=r"adapter_of must be \[2\] torch.int32"):
        rank_lora(tokens(2), a, b, router, bias, table, one(2).long())
    with pytest.raises(ValueError, match="gate must be one of"):
        Adapter(first_rank=0, ranks=4, gate="top2")
    with pytest.raises(ValueError, match="ranks a multiple of rows"):
        Adapter(first_rank=0, ranks=4, rows=3, chosen=1, gate="softmax_topk")
    with pytest.raises(ValueError, match="a constant gate has no router"):
        Adapter(first_rank=0, ranks=4, rows=4, chosen=1)


# Sums of D or of at most 8 products of numbers around one, in float32, and results rounded to the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def wide_case(dtype, D=157, O=147, T=37):
    """Widths beyond a column block that end in the middle of a vector; ragged adapters; tokens without any."""
    random = torch.Generator().manual_seed(11)
    a, router = torch.randn(23, D, generator=random) / D**0.5, torch.randn(13, D, generator=random) / D**0.5
    b, x = torch.randn(23, O, generator=random), torch.randn(T, D, generator=random)
    bias = 0.1 * torch.randn(13, generator=random)
    adapter_of = torch.randint(-1, len(MIXED), (T,), generator=random).int()
    return tuple(t.to(dtype) for t in (x, a, b, router)), bias, table_of(MIXED), adapter_of


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_equals_the_reference(isa, dtype):
    (x, a, b, router), bias, table, adapter_of = wide_case(dtype)
    arguments = (x, a, b, router, bias, table.places, table.scales, adapter_of)
    got = cpu.rank_lora_forward(*arguments, *table[2:], isa)
    wanted = reference.rank_lora_forward(*arguments, *table[2:])
    assert torch.equal(got[2], wanted[2])
    assert torch.equal(got[1], wanted[1])
    for mine, theirs in zip((got[0], *got[3:]), (wanted[0], *wanted[3:]), strict=True):
        assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    grad = torch.randn(*got[0].shape, generator=torch.Generator().manual_seed(12)).to(dtype)
    mine = cpu.rank_lora_backward(grad, *arguments, *got[2:], *table[4:], isa)
    theirs = reference.rank_lora_backward(grad, *arguments, *wanted[2:], *table[4:])
    for one_gradient, same in zip(mine, theirs, strict=True):
        scale = float(same.abs().max())
        assert_close(one_gradient, same, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_whole_blocks_and_tiles_equal_the_reference_and_no_token_knows_another(isa, dtype):
    """Routers of 80 rows, inputs of 1120: more than one block, pass of tokens and group of tiles, none half empty."""
    random = torch.Generator().manual_seed(14)
    x, a, router = (torch.randn(n, 1120, generator=random) for n in (37, 80, 80))
    b, bias = torch.randn(80, 64, generator=random).to(dtype), torch.zeros(80)
    x, a, router = x.to(dtype), (a / 33).to(dtype), (router / 33).to(dtype)
    adapter = Adapter(first_rank=0, ranks=80, rows=80, chosen=8, gate="sigmoid_renorm_unbiased")
    places, scales, *sizes = table_of([adapter])
    got = cpu.rank_lora_forward(x, a, b, router, bias, places, scales, one(37), *sizes, isa)
    wanted = reference.rank_lora_forward(x, a, b, router, bias, places, scales, one(37), *sizes)
    assert torch.equal(got[2], wanted[2])
    for mine, theirs in zip((got[0], *got[3:]), (wanted[0], *wanted[3:]), strict=True):
        assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for first, last in ((0, 1), (3, 6), (15, 37)):
        part = cpu.rank_lora_forward(
            x[first:last], a, b, router, bias, places, scales, one(last - first), *sizes, isa
        )  # fmt: skip
        assert torch.equal(part[0], got[0][first:last])


@pytest.mark.parametrize("T", [1, 2, 9])
def test_a_token_does_not_depend_on_its_batch_nor_on_the_threads(T):
    (x, a, b, router), bias, table, adapter_of = wide_case(torch.float32)
    whole = rank_lora(x, a, b, router, bias, table, adapter_of)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            part = rank_lora(x[5 : 5 + T], a, b, router, bias, table, adapter_of[5 : 5 + T])
            assert torch.equal(part.y, whole.y[5 : 5 + T])
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_apart():
    (x, a, b, router), bias, table, adapter_of = wide_case(torch.float32)
    apart = [torch.stack([t, t + 1], 1)[:, 0] for t in (x, a, b, router)]
    wanted = rank_lora(x, a, b, router, bias, table, adapter_of)
    assert torch.equal(rank_lora(*apart, bias, table, adapter_of).y, wanted.y)
    columns = [torch.stack([t, t + 1], 2)[:, :, 0] for t in (x, a, b, router)]
    assert torch.equal(rank_lora(*columns, bias, table, adapter_of).y, wanted.y)


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE], ids=str)
def test_it_is_added_to_some_columns_of_an_output(dtype):
    (x, a, b, router), bias, table, adapter_of = wide_case(dtype)
    wide = torch.randn(len(x), b.shape[1] + 9, generator=torch.Generator().manual_seed(13)).to(dtype)
    before = wide.clone()
    add_rank_lora(wide[:, 4:-5], x, a, b, router, bias, table, adapter_of)
    wanted = before[:, 4:-5].double() + rank_lora(x, a, b, router, bias, table, adapter_of).y.double()
    tolerance = TOLERANCE.get(dtype, 1e-12)
    assert_close(wide[:, 4:-5].double(), wanted, rtol=tolerance, atol=tolerance)
    untouched = torch.ones_like(wide, dtype=torch.bool)
    untouched[adapter_of >= 0, 4:-5] = False
    assert torch.equal(wide[untouched], before[untouched])
    with pytest.raises(ValueError, match=r"y must be \[37, 147\]"):
        add_rank_lora(wide, x, a, b, router, bias, table, adapter_of)


def test_adapters_that_do_not_exist_are_refused():
    (x, a, b, router), bias, table, adapter_of = wide_case(torch.float32)
    with pytest.raises(ValueError, match="token 0 has adapter 9 of 5"):
        rank_lora(x, a, b, router, bias, table, adapter_of * 0 + 9)
    with pytest.raises(ValueError, match="adapter 2 has ranks up to 19 of 18"):
        rank_lora(x, a[:18], b[:18], router, bias, table, adapter_of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_registration_is_sound(dtype):
    (x, a, b, router), bias, table, adapter_of = wide_case(dtype, T=6)
    arguments = (x, a, b, router, bias, table.places, table.scales, adapter_of)
    torch.library.opcheck(torch.ops.anabranch.rank_lora_forward.default, (*arguments, *table[2:]))
    saved = torch.ops.anabranch.rank_lora_forward(*arguments, *table[2:])[2:]
    grad = torch.ones(6, b.shape[1], dtype=dtype)
    torch.library.opcheck(torch.ops.anabranch.rank_lora_backward.default, (grad, *arguments, *saved, *table[4:]))
    y = torch.zeros(6, b.shape[1], dtype=dtype)
    torch.library.opcheck(torch.ops.anabranch.rank_lora_add.default, (y, *arguments, *table[2:]))
    compiled = torch.compile(lambda *t: rank_lora(*t, bias, table, adapter_of).y, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, a, b, router), rank_lora(x, a, b, router, bias, table, adapter_of).y)


COLUMNS = [(0, 0, O), (1, O, O + 7), (2, O + 7, O + 20)]


def fused(dtype, parts=COLUMNS):
    """Three layers of one input, with a plain and a routed adapter; the routed one has nothing in the second."""
    w = [weights(12, 12, dtype=dtype, seed=seed) for seed in range(3)]
    plain = Adapter(first_rank=0, ranks=4, scale=0.5)
    routed = Adapter(first_rank=4, ranks=6, first_row=4, rows=6, chosen=2, gate=GATES[3], scale=1.5)
    tables = [table_of([plain, other]) for other in (routed, Adapter(first_rank=0, ranks=0), routed)]
    columns = [b[:, : end - begin] for (_, b, *_), (_, begin, end) in zip(w, COLUMNS, strict=True)]
    a, router, bias = (torch.stack([layer[part] for layer in w]) for part in (0, 2, 3))
    return w, tables, FusedAdapters(
        a=a, b=torch.cat(columns, 1), router=router, bias=bias,
        places=torch.stack([table.places for table in tables]), scales=torch.stack([table.scales for table in tables]),
        parts=tuple(number for part in parts for number in part), sizes=(2, 4, 6, 6),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [COLUMNS, COLUMNS[1:], []], ids=len)
def test_fused_layers_are_each_layer_in_turn(dtype, parts):
    w, tables, adapters = fused(dtype, parts)
    x, of = tokens(9, dtype=dtype), torch.tensor([0, 1, -1, 0, 1, 1, -1, 0, 1], dtype=torch.int32)
    y = torch.randn(9, O + 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = y.clone()
    for p, begin, end in parts:
        a, b, router, bias = w[p]
        add_rank_lora(want[:, begin:end], x, a, b[:, : end - begin], router, bias, tables[p], of)
    for strided in (x, tokens(18, dtype=dtype)[::2].copy_(x), x.T.contiguous().T):
        got = y.clone()
        adapters.add_to(got, strided, of)
        assert torch.equal(got, want)
    columns = y.T.contiguous().T
    adapters.add_to(columns, x, of)  # for the reference: float64 inside
    tolerance = TOLERANCE.get(dtype, 1e-12)
    assert_close(columns, want, rtol=tolerance, atol=tolerance)


def test_fused_layers_that_do_not_fit_are_refused():
    _, _, adapters = fused(torch.float32)
    for change, message in (
        ({"a": adapters.a[0]}, "a must be .P, R, D."),
        ({"b": adapters.b[:5]}, "b must be .12, 40."),
        ({"bias": adapters.bias.double()}, "bias must be .3, 12. torch.float32"),
        ({"router": adapters.router.mT.contiguous().mT}, "contiguous"),
        ({"parts": (0, 0)}, "parts must be"),
        ({"parts": (3, 0, 5)}, "parts must be"),
        ({"parts": (0, 0, 41)}, "parts must be"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(adapters, **change)
    x, y, of = tokens(3, dtype=torch.float32), torch.zeros(3, 40), one(3)
    for wrong in ((y, x[:2], of), (y[:, :39], x, of), (y, x, of.long()), (y.double(), x, of), (y, x, one(2))):
        with pytest.raises(ValueError, match=r"x must be \[T, 24\], y \[T, 40\], both torch.float32"):
            adapters.add_to(*wrong)
    with pytest.raises(ValueError, match="token 0 has adapter 2 of 2"):
        adapters.add_to(y, x, one(3) + 2)


def test_the_registration_of_fused_layers_is_sound():
    _, _, f = fused(torch.float32)
    arguments = (f.a, f.b, f.router, f.bias, f.places, f.scales, one(3), list(f.parts), *f.sizes)
    op = torch.ops.anabranch.rank_lora_add_fused.default
    torch.library.opcheck(op, (torch.zeros(3, 40), tokens(3, dtype=torch.float32), *arguments))
