"""FedNoRo: noisy clients are found by their class losses, learn from the model they received, and count less.

    clean clients   CE(z + tau log pi, y)
    noisy clients   (1 - w_t) CE(z + tau log pi, y) + w_t KL(softmax(z_received / 0.8) || softmax(z + tau log pi))
                    w_t = 0.8 exp(-5 (1 - u)^2),  u = (t - warmup) / (rounds - warmup)
    server          distance-aware aggregation (distance_aware.py), from the first round on

Xu et al., arXiv 2305.05230.

From its code        the ramp, the temperature 0.8 of the received model alone, 20 rounds of the first stage.
Reconstructed here   its cross-entropy in the second stage is adjusted as in the first; a class that a client has none
                     of keeps a finite logit (labels/logit_adjustment.py), where the code has log 0; the received model
                     speaks in evaluation.
Shared               the stages (two_stages.py) and the aggregation, with FedELC.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.distance_aware import distance_aware
from anabranch.federated.method import Replies, Tensors, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Output
from anabranch.federated.packed import Batch
from anabranch.federated.two_stages import TwoStages
from anabranch.labels.softmax import log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class FedNoRo(TwoStages):
    """temperature   of what the received model says
    received      w at the end of training: the share of the loss that listens to the received model
    """

    temperature: float = 0.8
    received: float = 0.8

    def __post_init__(self) -> None:
        TwoStages.__post_init__(self)
        if not self.temperature > 0 or not 0 <= self.received <= 1:
            raise ValueError(f"need temperature > 0 and received in [0, 1], got {self.temperature} and {self.received}")

    def listening(self, round: int, rounds: int) -> float:
        """w_t of noisy clients in one of so many rounds."""
        u = min(1.0, (round - self.warmup) / max(1, rounds - self.warmup))
        return self.received * math.exp(-5 * (1 - u) ** 2)

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        adjusted = self.adjusted(visit, out.logits)
        given = batch_mean(cross_entropy(adjusted, batch.y), batch)
        noisy = visit.sent["noisy"]
        if not bool(noisy.any()):
            return given
        with torch.no_grad():
            teacher = visit.see(visit.received, batch.x, training=False).logits / self.temperature
        apart = F.kl_div(log_softmax(adjusted), log_softmax(teacher), log_target=True, reduction="none")
        w = self.listening(visit.round, visit.schedule.rounds) * noisy
        return (1 - w) * given + w * batch_mean(apart.sum(-1), batch)

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        return {**server, "model": distance_aware(server, replies)}
