"""FedLSR: a client that does not believe its labels holds on to what two views of a sample agree on. arXiv 2208.12807

    p_v = softmax(z_v) of two views v of a sample        q_v = softmax(tau z_v)
    p   = l p_1 + (1 - l) p_2,  l ~ U(0, 1)              p_s = p^2 / sum p^2
    L   = CE(p_s, y) + gamma_t JS(q_1, q_2) + gamma_e (H(q_1) + H(q_2)) / 2

gamma_t rises linearly to `gamma` in the first `ramp` rounds.

From the paper       sharpened predictions of mixed views, distilled into each other.
From FNBench         arXiv 2505.06684: tau = 3 (sharper, where distillation is softer), 0.4, 0.3, 24 of 120 rounds.
Reconstructed here   the second view is federated/augment.py's; one l a step and client.
Deviations           FNBench's code hands p_s to a cross-entropy that takes logits, takes entropies of probabilities as
                     if they were logits and of view 1 twice, and divides the divergence by the number of classes.
                     Logarithms of probabilities are kept throughout, so nothing is clamped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.augment import augment
from anabranch.federated.method import FedAvg, Visit, batch_mean
from anabranch.federated.packed import Batch
from anabranch.federated.streams import Purpose
from anabranch.labels.softmax import log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class FedLSR(FedAvg):
    """gamma    weight of the divergence between views
    entropy  weight of the entropy
    ramp     rounds until the divergence has its weight
    tau      factor of the logits in both
    """

    gamma: float = 0.4
    entropy: float = 0.3
    ramp: int = 24
    tau: float = 3.0

    def __post_init__(self) -> None:
        if min(self.gamma, self.entropy, self.ramp) < 0 or not self.tau > 0:
            raise ValueError(
                f"gamma, entropy and ramp must not be negative and tau positive, got {self.gamma}, {self.entropy}, "
                f"{self.ramp}, {self.tau}"
            )

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        views = torch.cat([batch.x, augment(batch.x, visit.streams, batch.number, 1)], 1)
        one, two = visit.see(rows, views).logits.chunk(2, 1)
        share = visit.streams.uniform(1, Purpose.MIX, batch.number)[..., None]
        mixed = torch.logaddexp(share.log() + log_softmax(one), torch.log1p(-share) + log_softmax(two))
        sharp = log_softmax(2 * mixed)
        loss = -sharp.gather(2, batch.y[..., None]).squeeze(2)
        one, two = log_softmax(self.tau * one), log_softmax(self.tau * two)
        gamma = self.gamma * min(1.0, visit.round / self.ramp) if self.ramp else self.gamma
        loss = loss + gamma * divergence(one, two) + self.entropy * (entropy(one) + entropy(two)) / 2
        return batch_mean(loss, batch)


def entropy(log_p: Tensor) -> Tensor:
    """Of distributions given by their logarithms [..., C]."""
    return -(log_p.exp() * log_p).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen's and Shannon's, of distributions given by their logarithms [..., C]; between 0 and log 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
