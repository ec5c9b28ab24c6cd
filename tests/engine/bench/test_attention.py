"""Every contender of the attention cases computes the same function, and bytes are counted as they lie in memory."""

from dataclasses import replace

import pytest
import torch

from anabranch.bench.attention import DECODE, Layer, Shape, decode, expand, fill_pages, make_layer, prefill
from anabranch.bench.timing import Case, check_agreement

SHAPES = [Shape(), Shape(Hq=8, Hk=2, Hv=8, width=32, page=16), Shape(Hq=4, Hk=1, Hv=1, width=16, page=8)]


def tighter(case: Case, tolerance: float) -> Case:
    """float32 leaves no room for the rounding of bfloat16; an int8 cache does not become more exact by it."""
    contenders = (replace(one, tolerance=one.tolerance if "int8" in one.name else tolerance) for one in case.contenders)
    return replace(case, contenders=tuple(contenders))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("context", [1, 37, 64])
def test_contenders_of_decode_agree(shape, context):
    check_agreement(tighter(decode(context, shape=shape, dtype=torch.float32, working_set=1), 1e-5))
    check_agreement(decode(context, shape=shape, dtype=torch.bfloat16, working_set=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contenders_of_prefill_agree(shape):
    check_agreement(tighter(prefill(33, shape=shape, dtype=torch.float32), 1e-5))
    check_agreement(prefill(33, shape=shape, dtype=torch.bfloat16))


def test_a_step_touches_the_working_set():
    shape = Shape(Hq=4, Hk=2, Hv=4, width=16)
    case = decode(32, shape=shape, dtype=torch.bfloat16, working_set=100_000)
    assert case.contenders[0].read_bytes >= 100_000
    assert case.contenders[0].read_bytes == case.calls * shape.cache_bytes(32, 2)
    assert case.contenders[0].step().shape == (case.calls, 1, 4, 16)
    assert [one.name for one in case.contenders] == list(DECODE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bytes_are_those_of_the_tensors(dtype):
    shape = Shape(Hq=8, Hk=2, Hv=4, width=32, page=16)
    layer = make_layer(1, 48, shape, torch.float32, torch.Generator().manual_seed(0))
    pages = fill_pages(layer, shape.page, dtype, torch.Generator().manual_seed(0))
    tensors = [pages.k_cache, pages.v_cache, pages.k_scales, pages.v_scales]
    scale_bytes = 4 if dtype == torch.int8 else 0
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert held == shape.cache_bytes(48, dtype.itemsize, scale_bytes=scale_bytes)
    wide = Layer(q=layer.q, k=expand(layer.k, shape.Hv), v=layer.v)
    assert wide.k.nbytes + wide.v.nbytes == shape.cache_bytes(48, 4, expanded=True)


def test_heads_that_cannot_be_expanded_are_refused():
    with pytest.raises(ValueError, match="Hq=8, Hk=4, Hv=2"):
        Shape(Hq=8, Hk=4, Hv=2)
