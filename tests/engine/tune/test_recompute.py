"""Computing activations again keeps less and changes nothing."""

import torch

from anabranch.adapters.attach import attach
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.tune.recompute import recompute_activations

CONFIG = ModelConfig(
    family="sigma", vocab_size=64, hidden_size=32, ffn_size=48, layers=3, q_heads=2, k_heads=1, v_heads=2, k_dim=16,
    v_dim=16, max_position=64, tie_embeddings=True, bos_id=0, eos_ids=(1,),
)  # fmt: skip


def one_step(*, recomputed):
    """(gradients, counts, bytes kept for the backward pass) of one step."""
    model = Transformer(CONFIG).initialise(torch.Generator().manual_seed(0), std=0.2).train()
    random = torch.Generator().manual_seed(1)
    settings = RankLoraSettings(ranks=8, chosen=2, block=2)
    adapters = attach(model, lambda name, inputs, outputs: RankLora(inputs, outputs, settings, generator=random))
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.b, generator=random)
    if recomputed:
        recompute_activations(model)
    kept = 0

    def pack(x):
        nonlocal kept
        kept += x.nbytes
        return x

    tokens = torch.randint(64, (40,), generator=random)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(tokens, torch.arange(40), DenseAttend(1))
        loss = model.logits(hidden).square().mean()
    before = kept
    loss.backward()
    gradients = {f"{name}.{key}": p.grad for name, one in adapters.items() for key, p in one.named_parameters()}
    return gradients, {name: one.counts for name, one in adapters.items()}, before, adapters


def test_gradients_and_counts_are_the_same_and_less_is_kept():
    plain, counts, kept, _ = one_step(recomputed=False)
    again, counts_again, kept_again, adapters = one_step(recomputed=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(gradient.any() for gradient in plain.values())
    assert all(torch.equal(counts[name], counts_again[name]) for name in counts)
    assert {int(count.sum()) for count in counts.values()} == {2 * 40}
    assert kept_again < kept / 5
    assert all(adapter.training for adapter in adapters.values())


def test_measuring_counts_nothing():
    model = Transformer(CONFIG).initialise(torch.Generator().manual_seed(0))
    settings = RankLoraSettings(ranks=4, chosen=1)
    adapters = attach(model, lambda name, inputs, outputs: RankLora(inputs, outputs, settings))
    recompute_activations(model)
    model.eval()
    with torch.no_grad():
        model(torch.arange(8), torch.arange(8), DenseAttend(1))
    assert not any(adapter.counts.any() or adapter.training for adapter in adapters.values())
