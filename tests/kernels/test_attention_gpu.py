"""The Triton kernels of dense attention against the reference; interpreted on a CPU where there is no GPU."""

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.attention import reference
from anabranch_kernels.attention.op import attention

pytest.importorskip("triton")
from anabranch_kernels.attention import gpu

# Rows that see nothing have log2(0) and NaN pages stay NaN: NumPy, under the interpreter, warns of both.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B, T, S, heads, Dk, Dv, dtype, seed=0):
    Hq, Hk, Hv = heads
    random = torch.Generator().manual_seed(seed)
    shapes = (B, T, Hq, Dk), (B, S, Hk, Dk), (B, S, Hv, Dv), (B, T, Hq, Dv)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 2, 4), (6, 3, 2), (4, 4, 2), (2, 1, 1), (4, 1, 2)])
@pytest.mark.parametrize(
    ("T", "S", "causal", "window"), [(70, 70, True, None), (37, 130, True, 50), (40, 33, False, None)]
)
def test_equals_the_reference_forward_and_backward(heads, T, S, causal, window, tolerance):
    q, k, v, grad = tensors(1, T, S, heads, 16, 24, torch.float32)
    out, lse = reference.attention_forward(q, k, v, causal, 0.3, window)
    wanted = out, lse, *reference.attention_backward(grad, q, k, v, out, lse, causal, 0.3, window)
    q, k, v, grad = (x.to(DEVICE) for x in (q, k, v, grad))
    out, lse = gpu.attention_forward(q, k, v, causal, 0.3, window)
    got = out, lse, *gpu.attention_backward(grad, q, k, v, out, lse, causal, 0.3, window)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine.cpu(), theirs, **tolerance(torch.float32))


def test_takes_short_dtypes_strides_and_several_sequences(tolerance):
    packed = torch.randn(3, 20, 4 + 2 + 4, 16, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    q, k, v = packed.split([4, 2, 4], 2)
    grad = q.transpose(1, 3).contiguous().transpose(1, 3)  # last stride is not 1
    out, lse = gpu.attention_forward(q, k, v, True, 0.25, None)
    got = out, *gpu.attention_backward(grad, q, k, v, out, lse, True, 0.25, None)
    exact = [x.double() for x in (q, k, v)]
    wide_out, wide_lse = reference.attention_forward(*exact, True, 0.25, None)
    wanted = reference.attention_backward(grad.double(), *exact, wide_out, wide_lse, True, 0.25, None)
    for mine, theirs in zip(got, (wide_out, *wanted), strict=True):
        assert_close(mine.double(), theirs, **tolerance(torch.float16))


def test_float64_goes_to_the_reference():
    q, k, v, grad = (x.to(DEVICE) for x in tensors(1, 4, 4, (4, 2, 4), 8, 8, torch.float64))
    out, lse = gpu.attention_forward(q, k, v, True, 0.3, None)
    assert_close(out, reference.attention_forward(q, k, v, True, 0.3, None)[0])
    got = gpu.attention_backward(grad, q, k, v, out, lse, True, 0.3, None)
    for mine, theirs in zip(got, reference.attention_backward(grad, q, k, v, out, lse, True, 0.3, None), strict=True):
        assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(32, 4, 16), (24, 8, 3), (8, 8, 2)])
@pytest.mark.parametrize(("T", "S", "window"), [(1000, 1000, None), (300, 1100, None), (900, 900, 128)])
def test_on_the_gpu_gradients_of_real_shapes(heads, width, T, S, window):
    q, k, v, grad = (x.to(DEVICE) for x in tensors(2, T, S, heads, width, width, torch.bfloat16))
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*mine, window=window)
    got = out, *torch.autograd.grad(out, mine, grad)
    exact = [x.double() for x in (q, k, v)]
    wide, lse = reference.attention_forward(*exact, True, width**-0.5, window)
    wanted = wide, *reference.attention_backward(grad.double(), *exact, wide, lse, True, width**-0.5, window)
    for one, other in zip(got, wanted, strict=True):
        assert (one.double() - other).norm() < 1e-2 * other.norm()  # 8 bits, and sums of such roundings


@pytest.mark.gpu
def test_on_the_gpu_two_backward_passes_agree_bit_for_bit():
    q, k, v, grad = (x.to(DEVICE) for x in tensors(2, 2000, 2000, (32, 4, 16), 64, 64, torch.bfloat16))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first = torch.autograd.grad(attention(*leaves), leaves, grad)
    for _ in range(5):
        for mine, theirs in zip(torch.autograd.grad(attention(*leaves), leaves, grad), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_on_the_gpu_opcheck_and_compile():
    q, k, v, grad = (x.to(DEVICE) for x in tensors(1, 40, 50, (4, 1, 2), 16, 16, torch.float16))
    torch.library.opcheck(torch.ops.anabranch.attention_forward.default, (q, k, v, True, 0.25, None))
    eager, compiled = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    attention(*eager).backward(grad)
    torch.compile(attention, fullgraph=True)(*compiled).backward(grad)
    for mine, theirs in zip(compiled, eager, strict=True):
        assert_close(mine.grad, theirs.grad)
