"""Dense attention with unequal heads: both back-ends against the reference, gradients, head maps, masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.attention import cpu, reference
from anabranch_kernels.attention.op import attention

HEADS = [(4, 4, 4), (8, 2, 4), (8, 1, 4), (12, 4, 3), (8, 4, 2), (6, 1, 1), (1, 1, 1)]
# A bfloat16 result carries 8 bits, a float16 one 11; the sums behind them are float32.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensors(B, T, S, heads, Dk, Dv, dtype=torch.float64, seed=0):
    Hq, Hk, Hv = heads
    random = torch.Generator().manual_seed(seed)
    shapes = (B, T, Hq, Dk), (B, S, Hk, Dk), (B, S, Hv, Dv), (B, T, Hq, Dv)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def relative(got, wanted):
    assert got.shape == wanted.shape
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


@st.composite
def problems(draw):
    heads = draw(st.sampled_from(HEADS))
    T = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    S = T + draw(st.integers(0, 7)) if causal else draw(st.integers(1, 12))
    window = draw(st.none() | st.integers(1, 8)) if causal else None
    widths = draw(st.sampled_from([(8, 8), (4, 8), (8, 4), (5, 3)]))
    return tensors(draw(st.integers(1, 3)), T, S, heads, *widths), causal, window


@given(problems())
@settings(deadline=None, max_examples=60)
def test_cpu_equals_the_reference_forward_and_backward(problem):
    (q, k, v, grad), causal, window = problem
    out, lse = reference.attention_forward(q, k, v, causal, 0.3, window)
    got, got_lse = cpu.attention_forward(q, k, v, causal, 0.3, window)
    assert_close(got, out)
    assert_close(got_lse, lse)
    wanted = reference.attention_backward(grad, q, k, v, out, lse, causal, 0.3, window)
    for mine, theirs in zip(cpu.attention_backward(grad, q, k, v, out, lse, causal, 0.3, window), wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_short_dtypes_stay_within_their_precision(dtype, window):
    q, k, v, grad = tensors(2, 33, 40, (8, 2, 4), 16, 24, dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    attention(*exact, window=window).backward(grad.double())
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*mine, window=window)
    out.backward(grad)
    assert out.dtype == dtype
    assert relative(out, attention(*exact, window=window)) < RELATIVE[dtype]
    for x, y in zip(mine, exact, strict=True):
        assert x.grad.dtype == dtype
        assert relative(x.grad, y.grad) < RELATIVE[dtype]


@pytest.mark.parametrize("heads", HEADS)
def test_equals_torch_on_expanded_heads(heads):
    q, k, v, _ = tensors(2, 7, 7, heads, 8, 8)
    K, V = (x.repeat_interleave(heads[0] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    peer = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), K, V, is_causal=True)
    assert_close(attention(q, k, v), peer.transpose(1, 2))


@pytest.mark.parametrize("heads", HEADS)
def test_each_query_head_reads_its_own_value_head(heads):
    Hq, _, Hv = heads
    q, k, v, _ = tensors(1, 5, 5, heads, 4, 4)
    v[:] = torch.arange(Hv, dtype=v.dtype)[:, None]
    owner = torch.arange(Hq, dtype=v.dtype) // (Hq // Hv)
    assert_close(attention(q, k, v), owner[:, None].expand(1, 5, Hq, 4))


@pytest.mark.parametrize("heads", HEADS)
def test_each_query_head_reads_its_own_key_head(heads):
    Hq, Hk, Hv = heads
    q, k = torch.full((1, 1, Hq, Hk), 1e3, dtype=torch.float64), torch.eye(Hk, dtype=torch.float64)[None, :, :, None]
    k = k.expand(1, Hk, Hk, Hk) * torch.eye(Hk, dtype=torch.float64)  # token j is bright in head j alone
    v = torch.arange(Hk, dtype=torch.float64)[None, :, None, None].expand(1, Hk, Hv, 1)
    owner = torch.arange(Hq, dtype=torch.float64) // (Hq // Hk)
    assert_close(attention(q, k, v, causal=False, scale=1.0)[0, 0, :, 0], owner)


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 4, 2), (6, 2, 3), (4, 1, 2)])
@pytest.mark.parametrize(("T", "S", "causal", "window"), [(4, 4, True, None), (3, 5, True, 2), (3, 4, False, None)])
def test_gradients_equal_finite_differences(heads, T, S, causal, window):
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, T, S, heads, 3, 2))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, causal=causal, window=window), (q, k, v))


def test_only_the_asked_for_gradient_is_given():
    q, k, v, grad = tensors(1, 4, 4, (4, 2, 4), 8, 8)
    k.requires_grad_()
    attention(q, k, v).backward(grad)
    assert k.grad.shape == k.shape
    assert q.grad is None


def test_a_constant_added_to_every_key_changes_nothing():
    q, k, v, _ = tensors(2, 6, 6, (8, 2, 4), 8, 8)
    assert_close(attention(q, k + torch.randn(8, dtype=k.dtype), v), attention(q, k, v))


@pytest.mark.parametrize("window", [None, 3])
def test_the_last_rows_of_a_long_query_equal_a_short_one(window):
    q, k, v, _ = tensors(2, 9, 9, (8, 2, 4), 8, 4)
    assert_close(attention(q[:, -4:], k, v, window=window), attention(q, k, v, window=window)[:, -4:])


def test_a_wide_window_is_no_window():
    q, k, v, _ = tensors(1, 6, 8, (4, 1, 2), 8, 8)
    assert_close(attention(q, k, v, window=8), attention(q, k, v))


@pytest.mark.parametrize("back_end", [cpu, reference])
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 0), (2, 0, 3), (2, 3, 0)])
def test_empty_sizes_give_zeros(back_end, B, T, S):
    q, k, v, grad = tensors(B, T, S, (4, 2, 4), 8, 6)
    out, lse = back_end.attention_forward(q, k, v, False, 1.0, None)
    assert_close(out, torch.zeros(B, T, 4, 6, dtype=q.dtype))
    assert_close(lse, torch.full((B, T, 4), -torch.inf, dtype=q.dtype) if S == 0 else lse)
    gradients = back_end.attention_backward(grad, q, k, v, out, lse, False, 1.0, None)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_strided_inputs_give_the_same_result():
    packed = torch.randn(2, 5, 8 + 2 + 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.split([8, 2, 4], 2)
    across = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]  # last stride is not 1
    assert_close(attention(*across), attention(q.contiguous(), k.contiguous(), v.contiguous()))
    attention(*across).sum().backward()
    assert packed.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("S", "window"), [(5, None), (7, 3)])
def test_opcheck(dtype, S, window):
    q, k, v, grad = tensors(2, 5, S, (4, 1, 2), 8, 6, dtype)
    out, lse = torch.ops.anabranch.attention_forward(q, k, v, True, 0.3, window)
    backward = torch.ops.anabranch.attention_backward.default
    torch.library.opcheck(backward, (grad, q, k, v, out, lse, True, 0.3, window))
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.anabranch.attention_forward.default, (strided, k, v, True, 0.3, window))


def test_compiles_whole_and_trains():
    q, k, v, grad = tensors(1, 5, 5, (4, 1, 2), 8, 8)
    eager = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled = [x.clone().requires_grad_() for x in (q, k, v)]
    attention(*eager, window=3).mul(2).backward(grad)
    step = torch.compile(lambda *x: attention(*x, window=3).mul(2), fullgraph=True, backend="aot_eager")
    step(*compiled).backward(grad)
    for x, y in zip(compiled, eager, strict=True):
        assert_close(x.grad, y.grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: attention(q[0], k, v), r"q must be \[B, T, Hq, Dk\], got \[4, 4, 8\]"),
        (lambda q, k, v: attention(q, k.float(), v), "one dtype"),
        (lambda q, k, v: attention(q.int(), k.int(), v.int()), "one dtype"),
        (lambda q, k, v: attention(q, k.to("meta"), v), "one device"),
        (lambda q, k, v: attention(q, k[:, :3], v), "S must agree"),
        (lambda q, k, v: attention(q, k[..., :4], v), "one head width Dk, got 8 and 4"),
        (lambda q, k, v: attention(q[:, :, :3], k, v), "Hq=3, Hk=2"),
        (lambda q, k, v: attention(q[:, :, :0], k, v), "must be positive"),
        (lambda q, k, v: attention(q, k[:, :3], v[:, :3]), "T=4, S=3"),
        (lambda q, k, v: attention(q, k, v, window=0), "window=0"),
        (lambda q, k, v: attention(q, k, v, window=2, causal=False), "causal=False"),
    ],
)
def test_bad_input_is_named(change, words):
    q, k, v, _ = tensors(1, 4, 4, (4, 2, 4), 8, 8)
    with pytest.raises(ValueError, match=words):
        change(q, k, v)
