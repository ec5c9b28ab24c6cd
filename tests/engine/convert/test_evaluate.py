"""What two models are said to differ by, against SciPy and sums by hand."""

import math

import pytest
import torch
from scipy.stats import entropy

from anabranch.convert import evaluate
from anabranch.convert.evaluate import compare, divergence, log_probabilities
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer

CONFIG = ModelConfig(
    family="sigma", vocab_size=11, hidden_size=8, ffn_size=8, layers=1, q_heads=2, k_heads=1, v_heads=2, k_dim=4,
    v_dim=4, max_position=16,
)  # fmt: skip


def model(seed: int) -> Transformer:
    return Transformer(CONFIG).initialise(torch.Generator().manual_seed(seed), 0.5).eval()


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(5))
    targets = tokens[:, 1:].clone()
    targets[2, 4:] = -100
    return tokens[:, :-1], targets


def test_the_divergence_is_scipys_and_not_its_mirror():
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    wanted = entropy(p.exp().double().numpy(), q.exp().double().numpy(), axis=-1)
    assert divergence(p, q).numpy() == pytest.approx(wanted, abs=1e-5)
    assert abs(divergence(q, p).numpy() - wanted).max() > 0.01


@pytest.mark.parametrize("logits", [1, 200, 1 << 25])
@torch.no_grad()
def test_places_without_a_target_do_not_count(logits, monkeypatch):
    original, other = model(0), model(1)
    inputs, targets = windows()
    monkeypatch.setattr(evaluate, "LOGITS", logits)  # one window at a time, two, all
    got = compare(original, other, inputs, targets)
    p, q = (torch.cat([log_probabilities(m, x[None], DenseAttend(1)) for x in inputs]) for m in (original, other))
    kept = [i for i, target in enumerate(targets.flatten().tolist()) if target != -100]
    assert got.tokens == len(kept) == 20
    wanted = targets.flatten()
    assert got.perplexity_original == pytest.approx(math.exp(-sum(float(p[i, wanted[i]]) for i in kept) / 20), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(-sum(float(q[i, wanted[i]]) for i in kept) / 20), rel=1e-5)
    assert got.kl == pytest.approx(sum(float((p[i].exp() * (p[i] - q[i])).sum()) for i in kept) / 20, rel=1e-4)
    assert got.same_top == pytest.approx(sum(int(p[i].argmax() == q[i].argmax()) for i in kept) / 20)
    assert 0 < got.same_top < 1


def test_a_model_agrees_with_itself():
    got = compare(model(0), model(0), *windows())
    assert (got.kl, got.same_top) == (0.0, 1.0)
    assert got.perplexity == got.perplexity_original
