"""The back-end as vLLM drives it, on a CPU: build, write, attend, for prompts, chunks and steps in one batch."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from anabranch.integrations.vllm.pages import own_columns, wide_v

PAGE, DK, DV = 4, 16, 24
TABLE = torch.tensor([[5, 2, 0], [8, 1, 6], [3, 7, 4]], dtype=torch.int32)
NEW, LENGTHS = [5, 1, 3], [5, 7, 9]  # a prompt, a step, a chunk


@pytest.fixture
def backend(vllm):
    return import_module("anabranch.integrations.vllm.backend").AnabranchBackend


def slots(b, first, last):
    return [int(TABLE[b, p // PAGE]) * PAGE + p % PAGE for p in range(first, last)]


def batch(causal=True):
    starts = torch.tensor([0, 5, 6, 9, 9], dtype=torch.int32)  # vLLM's tensors may be longer than the batch
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([*LENGTHS, 77], dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=12,
        block_table_tensor=torch.cat([TABLE, torch.full((1, 3), -1, dtype=torch.int32)]),
        causal=causal,
    )


def build(backend, causal=True):
    builder = backend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
    return builder.build(0, batch(causal))


def run(backend, Hq, Hk, Hv, *, window=None, told=True, dtype=torch.float32):
    """(what the back-end gives, what a plain computation gives), both [9, Hq, columns], and the whole output."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
    q, keys, values = draw(12, Hq, DK), draw(3, 9, Hk, DK), draw(3, 9, Hv, DV)  # three tokens of padding
    options = {"num_value_heads": Hv} if told else {}
    layer = backend.get_impl_cls()(Hq, DK, DK**-0.5, Hk, None, window, "auto", None, "decoder", None, **options)
    cache = torch.full((9, Hk, PAGE, DK + wide_v(Hk, Hv, DV)), torch.nan, dtype=dtype)
    for b, (new, length) in enumerate(zip(NEW, LENGTHS, strict=True)):  # what earlier steps left
        past = length - new
        wide = values[b, :past].reshape(past, Hk, wide_v(Hk, Hv, DV))
        layer.do_kv_cache_update(None, keys[b, :past], wide, cache, torch.tensor(slots(b, 0, past), dtype=torch.int64))
    fresh = [(b, p) for b in range(3) for p in range(LENGTHS[b] - NEW[b], LENGTHS[b])]
    key = torch.stack([keys[b, p] for b, p in fresh] + [keys[0, 0]] * 3)
    value = torch.stack([values[b, p] for b, p in fresh] + [values[0, 0]] * 3).reshape(12, Hk, -1)
    mapping = torch.tensor([slots(b, p, p + 1)[0] for b, p in fresh] + [-1] * 3)
    layer.do_kv_cache_update(None, key, value, cache, mapping)
    output = torch.full((12, Hq, wide_v(Hk, Hv, DV)), 7.0, dtype=dtype)
    assert layer.forward(None, q, key, value, cache, build(backend), output) is output
    wanted = []
    for row, (b, p) in enumerate(fresh):
        first = 0 if window is None else max(0, p + 1 - window)
        k, v = (x[b, first : p + 1].double().repeat_interleave(Hq // x.shape[2], 1) for x in (keys, values))
        weights = (torch.einsum("hd,shd->hs", q[row].double(), k) / DK**0.5).softmax(-1)
        wanted.append(torch.einsum("hs,shd->hd", weights, v))
    return own_columns(output[:9], Hk, Hv).reshape(9, Hq, DV), torch.stack(wanted), output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("Hq", "Hk", "Hv"), [(8, 2, 4), (8, 4, 4), (6, 1, 3)])
def test_a_mixed_batch_equals_a_plain_computation(backend, Hq, Hk, Hv, window, dtype, tolerance):
    got, wanted, output = run(backend, Hq, Hk, Hv, window=window, dtype=dtype)
    assert_close(got.double(), wanted, **tolerance(dtype))
    assert (output[9:] == 7).all()  # rows of padding are left alone


@pytest.mark.parametrize("told", [False, True])
def test_a_model_that_does_not_name_its_v_heads_reads_the_same_columns(backend, told):
    got, wanted, output = run(backend, 8, 2, 4, told=told)
    assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (output[:9] == 7).any() == told  # untold, it fills the columns of others too


def test_while_vllm_measures_memory_there_is_no_batch(backend):
    layer = backend.get_impl_cls()(8, DK, 0.25, 2)
    output = torch.full((3, 8, DV), 7.0)
    q, cache = torch.zeros(3, 8, DK), torch.zeros(0)
    assert (layer.forward(None, q, q, q, cache, None, output) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alibi_slopes": [1.0]}, r"alibi_slopes=\[1.0\]"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap=30.0"),
        ({"attn_type": "encoder"}, "attn_type='encoder'"),
        ({"num_value_heads": 3}, "num_heads=8, self.num_kv_heads=2, self.num_value_heads=3"),
        ({"num_value_heads": 1}, "multiple of K heads"),
    ],
)
def test_layers_it_cannot_do_are_refused(backend, options, message):
    with pytest.raises(ValueError, match=message):
        backend.get_impl_cls()(8, DK, 0.25, 2, **options)


def test_batches_it_cannot_do_are_refused(backend):
    with pytest.raises(ValueError, match="got causal=False"):
        build(backend, causal=False)
    layer = backend.get_impl_cls()(8, DK, 0.25, 2)
    q = torch.zeros(3, 8, DK)
    with pytest.raises(ValueError, match="output scale"):
        layer.forward(None, q, q, q, q, build(backend), q, output_scale=torch.ones(1))


def test_vllm_is_told_what_it_can_do(backend):
    assert [layout.name for layout in backend.supported_kv_cache_layouts()] == ["LBHNC", "LBNHC", "BLHNC"]
    assert backend.forward_includes_kv_cache_update is False  # so vLLM calls do_kv_cache_update itself
    assert backend.supports_sliding_window()
    assert not backend.supports_kv_connector()
