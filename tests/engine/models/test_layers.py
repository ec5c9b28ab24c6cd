"""The pieces of a block against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.models.layers import Linear, linear, rms_norm, silu_mul


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_linear_is_the_same_product_with_and_without_gradients(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(96, 50, bias=bias, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(rows, 96, generator=generator)
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()).float()
    trained = layer(x)
    assert trained.requires_grad
    # Sums of 96 products of order one: 1e-5 is about ten roundings of the sum.
    torch.testing.assert_close(trained, expected, atol=1e-5 * 10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-5 * 10, rtol=0)


def test_a_frozen_linear_still_passes_gradients_to_its_input() -> None:
    """Adapters train through weights that need no gradient themselves."""
    weight, x = torch.randn(5, 7), torch.randn(2, 7, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_sums_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    weight = torch.linspace(0.5, 2, 4096, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    # Rounded at most twice in its dtype: a sum of 4096 bfloat16 squares in bfloat16 would be off by tens of percent.
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=0, rtol=2 * torch.finfo(dtype).eps)


def test_silu_mul_takes_the_gate_first() -> None:
    gate, up = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(silu_mul(torch.cat([gate, up], -1)), gate * torch.sigmoid(gate) * up)
