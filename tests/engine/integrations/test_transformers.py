"""transformers' own models on this attention: equal to its eager attention, whatever the mask, or refused by name."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from anabranch.integrations import transformers as integration
from anabranch.integrations.transformers import NAME, attend, make_mask, register

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=7),
}
B, T = 3, 40


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()
    register()  # twice is once


@pytest.fixture(params=list(CONFIGS))
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager").eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager").eval()


@pytest.fixture
def ids():
    return torch.randint(1, 97, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded():
    """Padding on the left of two sequences."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :13] = mask[1, :3] = 0
    return mask


@pytest.fixture
def ops(monkeypatch):
    """Names of what computes, in order."""
    called = []
    for name in ("attention", "paged_attention"):
        op = getattr(integration, name)
        monkeypatch.setattr(
            integration, name, lambda *a, _name=name, _op=op, **k: (called.append(_name), _op(*a, **k))[1]
        )
    torches = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (called.append("masked"), torches(*a, **k))[1]
    )
    return called


def on_both(model, work):
    """What `work` gives on transformers' eager attention and on ours."""
    results = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        results.append(work())
    return results


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def test_logits_equal_eager(model, ids):
    eager, ours = on_both(model, lambda: logits(model, ids))
    assert_close(ours, eager, atol=1e-4, rtol=0)  # the promise; what is left of it is a matter of 1e-6


def test_logits_equal_eager_beside_padding(model, ids, padded):
    eager, ours = on_both(model, lambda: logits(model, ids, attention_mask=padded))
    seen = padded.bool()
    assert_close(ours[seen], eager[seen], atol=1e-4, rtol=0)
    assert ours.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [False, True])
def test_greedy_tokens_equal_eager(model, ids, padded, cache, pads):
    options = {"attention_mask": padded} if pads else {}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    eager, ours = on_both(model, lambda: model.generate(ids, max_new_tokens=9, do_sample=False, **options))
    assert ours.shape == (B, T + 9)
    assert torch.equal(ours, eager)


def test_texts_packed_into_a_row_do_not_see_each_other(model, ids):
    positions = torch.cat([torch.arange(18), torch.arange(T - 18)]).expand(B, -1)
    packed = {"position_ids": positions, "use_cache": False}  # with a cache transformers does not look for texts
    eager, ours = on_both(model, lambda: logits(model, ids, **packed))
    assert_close(ours, eager, atol=1e-4, rtol=0)
    assert_close(ours[:, 18:], logits(model, ids[:, 18:]), atol=1e-4, rtol=0)


def test_bfloat16_is_as_near_to_float32_as_eager_is(model, ids, padded):
    """The rule of FlashAttention's tests: at most twice the error of the same precision in plain torch."""
    model.set_attn_implementation("eager")
    exact = logits(model, ids, attention_mask=padded)
    model.bfloat16()
    seen = padded.bool()
    errors = [
        (got.float() - exact)[seen].norm() for got in on_both(model, lambda: logits(model, ids, attention_mask=padded))
    ]
    assert 0 < errors[1] <= 2 * errors[0]


def test_training_gives_the_gradients_of_eager(model, ids, padded):
    def gradients():
        model.zero_grad()
        learnt = (padded.cumsum(1) > 1).bool()  # a first token would be foretold by padding, whose rows are anybody's
        labels = ids.masked_fill(~learnt, -100)
        model(ids, attention_mask=padded, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    for ours, eager in zip(*reversed(on_both(model, gradients)), strict=True):
        # float32 sums of up to 64 * 120 terms in another order: relative to the largest gradient of the tensor
        assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_which_op_runs(llama, ids, ops, training):
    padded = torch.ones(B, T, dtype=torch.long)
    padded[0, :5] = padded[1, :3] = 0
    llama.set_attn_implementation(NAME)
    with torch.set_grad_enabled(training):
        llama(ids)
        assert set(ops) == {"attention"}
        ops.clear()
        llama(ids, attention_mask=padded)  # a call for each sequence, as each is padded otherwise
        assert ops == ["attention"] * 2 * B
        ops.clear()
        out = llama(ids[:, :9], use_cache=True)
        ops.clear()
        llama(ids[:, 9:10], cache=out.past_key_values)
        assert set(ops) == ({"attention"} if training else {"paged_attention"})


def test_the_static_cache_is_read_as_far_as_it_is_full(llama, ids, ops):
    llama.set_attn_implementation(NAME)
    llama.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert ops == ["attention"] * 2 + ["paged_attention"] * 4  # prefill, then two steps, of two layers


class Uneven(nn.Module):
    """A layer with 2 K heads and 4 V heads, wider than K's, and a cache of transformers."""

    is_causal = True

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 8 * 16), nn.Linear(32, 2 * 16), nn.Linear(32, 4 * 24)

    def heads(self, x):
        return [
            projection(x).unflatten(-1, (-1, width)).transpose(1, 2)
            for projection, width in ((self.q, 16), (self.k, 16), (self.v, 24))
        ]

    def forward(self, x, cache=None, mask=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        return attend(self, q, k, v, mask)[0]


def by_hand(q, k, v, mask):
    """float64; rows that see nothing give zeros."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def test_unequal_heads_prefill_and_decode_over_a_cache_of_transformers():
    from transformers import DynamicCache

    torch.manual_seed(0)
    layer, x, cache = Uneven(), torch.randn(2, 12, 32), DynamicCache()
    with torch.no_grad():
        out = torch.cat([layer(x[:, :9], cache), *(layer(x[:, t : t + 1], cache) for t in range(9, 12))], 1)
    assert [cache.layers[0].keys.shape[1], cache.layers[0].values.shape[1]] == [2, 4]
    wanted = by_hand(*layer.heads(x), torch.ones(12, 12, dtype=torch.bool).tril())
    assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


def blind_and_holed():
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask[0, :, :, :2] = False  # its first two rows see nothing
    mask[1, :, 5:, 3] = False  # a hole: no causal piece
    return mask


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        blind_and_holed(),
        blind_and_holed()[:1],
        torch.rand(1, 8, 7, 7, generator=torch.Generator().manual_seed(3)) > 0.4,
        torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(4)) > 0.4,
    ],
)
def test_any_boolean_mask_is_obeyed_with_unequal_heads(mask, trains):
    torch.manual_seed(0)
    layer, x = Uneven(), torch.randn(2, 7, 32)
    with torch.set_grad_enabled(trains):
        out = layer(x, mask=mask)
    q, k, v = layer.heads(x)
    wanted = by_hand(q, k, v, mask)
    assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    if trains:
        gradients = [
            torch.autograd.grad(y.square().sum(), list(layer.parameters()), retain_graph=True) for y in (out, wanted)
        ]
        for ours, exact in zip(*gradients, strict=True):
            assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_numbers_in_a_mask_are_added_to_the_scores():
    torch.manual_seed(0)
    layer, x = Uneven(), torch.randn(2, 7, 32)
    bias = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        q, k, v = layer.heads(x)
        out = layer(x, mask=bias)
        K, V = k.repeat_interleave(4, 1), v.repeat_interleave(2, 1)
        wanted = ((q @ K.transpose(2, 3) / 4 + bias).softmax(-1) @ V).transpose(1, 2)
    assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_a_mask_that_is_written_to_is_read_again():
    torch.manual_seed(0)
    layer, x = Uneven(), torch.randn(1, 7, 32)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with torch.no_grad():
        before = layer(x, mask=mask)
        mask[..., :3] = False
        after = layer(x, mask=mask)
    assert_close(after.double(), by_hand(*layer.heads(x), mask), atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, after)


def test_inference_mode_and_compiled_graphs(llama, ids, padded):
    eager = logits(llama, ids, attention_mask=padded)
    llama.set_attn_implementation(NAME)
    with torch.inference_mode():
        assert_close(llama(ids, attention_mask=padded).logits[padded.bool()], eager[padded.bool()], atol=1e-4, rtol=0)
    mask = blind_and_holed()
    layer = Uneven()
    x = torch.randn(2, 7, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x, mask=mask), layer(x, mask=mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 0, 0, dtype=torch.bool)])
def test_nothing_attends_to_nothing(mask):
    q, k, v = torch.randn(2, 8, 0, 16), torch.randn(2, 2, 0, 16), torch.randn(2, 4, 0, 24)
    assert attend(nn.Identity(), q, k, v, mask)[0].shape == (2, 0, 8, 24)


@pytest.mark.parametrize(("heads", "op"), [((8, 2, 2), "paged_attention"), ((8, 8, 8), "attention")])
def test_a_step_reads_shared_heads_in_place_and_leaves_the_others_to_the_dense_op(heads, op, ops):
    q, k, v = (torch.randn(2, H, S, 16) for H, S in zip(heads, (1, 9, 9), strict=True))
    out = attend(nn.Identity(), q, k, v, None)[0]
    assert ops == [op]
    assert_close(out.double(), by_hand(q, k, v, torch.ones(1, 9, dtype=torch.bool)), atol=1e-5, rtol=1e-5)


def test_every_key_without_causality():
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 4, 9, 16)
    everything = torch.ones(5, 9, dtype=torch.bool)
    out, weights = attend(nn.Identity(), q, k, v, None, is_causal=False)
    assert weights is None
    assert_close(out.double(), by_hand(q, k, v, everything), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("S", [4, 40])
def test_a_window_without_a_mask_holds_for_prefill_and_for_a_step(S):
    q, k, v = torch.randn(1, 8, S, 16), torch.randn(1, 2, S, 16), torch.randn(1, 4, S, 16)
    mask = torch.ones(S, S, dtype=torch.bool).tril().triu(-5)
    whole = attend(nn.Identity(), q, k, v, None, sliding_window=6)[0]
    step = attend(nn.Identity(), q[:, :, -1:], k, v, None, sliding_window=6)[0]
    assert_close(whole.double(), by_hand(q, k, v, mask), atol=1e-5, rtol=1e-5)
    assert_close(step, whole[:, -1:], atol=1e-5, rtol=1e-5)


def test_no_mask_is_left_out_where_it_would_be_unclear():
    """transformers leaves it out before an empty static cache, whose last keys are empty."""
    mask = make_mask(batch_size=1, q_length=3, kv_length=8, q_offset=0, kv_offset=0)
    assert mask.shape == (1, 1, 3, 8)
    assert make_mask(batch_size=1, q_length=8, kv_length=8, q_offset=0, kv_offset=0) is None
    assert make_mask(batch_size=1, q_length=1, kv_length=8, q_offset=7, kv_offset=0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "no dropout, got dropout=0.1"),
        ({"softcap": 50.0}, "no softcap"),
        ({"s_aux": torch.zeros(8)}, "no s_aux"),
        ({"position_bias": torch.zeros(8)}, "no position_bias"),
        ({"output_attentions": True}, "never forms its weights"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "packed into one row need position_ids"),
        ({"is_causal": False, "sliding_window": 3}, "both ways needs a mask"),
        ({"attention_mask": torch.ones(2, 5)}, r"must be \[2 or 1, 8 or 1, 5, 5\].*got \[2, 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.long)}, r"booleans or floats, got .* torch.int64"),
        ({"attention_mask": torch.ones(2, 1, 5, 6)}, r"got \[2, 1, 5, 6\]"),
        ({"attention_mask": "causal"}, "must be a tensor .*, got str"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(options, message):
    q = torch.randn(2, 8, 5, 16)
    options = {"attention_mask": None} | options
    with pytest.raises(ValueError, match=message):
        attend(nn.Identity(), q, q, q, **options)


def test_fewer_queries_than_keys_need_a_mask():
    q, k = torch.randn(1, 8, 3, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(ValueError, match="unclear without a mask: got T=3 queries, S=9 keys"):
        attend(nn.Identity(), q, k, k, None)


def test_a_transformers_with_other_masks_is_refused(monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match=r"masks are made from q_length, as in 5\.24; got "):
        register()


def test_without_transformers_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers>=5"):
        register()


def test_weights_of_the_attention_are_refused_by_a_model(llama, ids):
    llama.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="never forms its weights"):
        llama(ids, output_attentions=True)
