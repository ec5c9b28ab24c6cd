"""How much a converted model differs from its original on a text."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.models.transformer import Attend, DenseAttend, Transformer

LOGITS = 1 << 25  # of one model at once: 128 MiB, four or five times that at the most


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two models on the same tokens.

    kl          KL(original || converted) of the next token, mean in nats
    same_top    share of the places where both hold the same token for the most probable
    perplexity_original, perplexity    exp of the mean cross-entropy, of either
    tokens      places counted
    """

    kl: float
    same_top: float
    perplexity_original: float
    perplexity: float
    tokens: int


def log_probabilities(model: Transformer, inputs: Tensor, attend: Attend) -> Tensor:
    """Of every next token after inputs [B, T] int64: [B * T, vocabulary] float32."""
    B, T = inputs.shape
    positions = torch.arange(T, device=inputs.device).repeat(B)
    return model.logits(model(inputs.flatten(), positions, attend)).log_softmax(-1)


def divergence(original: Tensor, converted: Tensor) -> Tensor:
    """KL(original || converted) in nats for each row of two [n, vocabulary] of log probabilities: [n]."""
    return F.kl_div(converted, original, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def compare(original: Transformer, converted: Transformer, inputs: Tensor, targets: Tensor) -> Agreement:
    """Measure over windows of text.

    inputs, targets  [n, context] int64 as from `held_out_windows`; targets of -100 count nothing
    """
    device = original.embed.device
    batch = max(1, LOGITS // (inputs.shape[1] * original.config.vocab_size))
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for x, y in zip(inputs.to(device).split(batch), targets.to(device).split(batch), strict=True):
        counted = y.flatten() != -100
        wanted = y.flatten()[counted]
        p, q = (log_probabilities(model, x, DenseAttend(len(x)))[counted] for model in (original, converted))
        parts = (
            divergence(p, q),
            p.argmax(-1) == q.argmax(-1),
            F.nll_loss(p, wanted, reduction="none"),
            F.nll_loss(q, wanted, reduction="none"),
        )
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        tokens += len(wanted)
    kl, same, before, after = (sums / tokens).tolist()
    return Agreement(
        kl=kl, same_top=same, perplexity_original=math.exp(before), perplexity=math.exp(after), tokens=tokens
    )
