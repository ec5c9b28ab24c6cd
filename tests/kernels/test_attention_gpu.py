"""The Triton kernels of dense attention against the reference; interpreted on a CPU where there is no GPU."""

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.attention import reference

pytest.importorskip("triton")
from anabranch_kernels.attention import gpu

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
