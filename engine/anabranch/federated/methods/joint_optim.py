"""Joint optimisation: labels become what the network has been saying of their samples. arXiv 1803.11364

    L = CE(s, p) + alpha L_p + beta L_e        s: a sample's label, a distribution
    L_p = -sum_c log(m_c) / C                  m: mean prediction of the batch; no class may be forgotten
    L_e = H(p)                                 a sample is of one class

From round `warm_up` on, after each epoch, s is the mean of the latest `history` predictions, or its largest (hard).

From the paper   the loss, and labels by the mean of past predictions.
From its code    FNBench's alpha = 1.2, beta = 0.8, history = 15 and warm_up = int(0.2 rounds); predictions are those of
                 training. Its mean counts predictions not made yet as zeros, and one new sample in a batch adds 1 to
                 the labels of all; here the mean is of those made, and samples never predicted keep their labels.
Shared           labels/losses.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit, batch_mean
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.packed import Batch, Packed
from anabranch.labels.losses import uniform_prior
from anabranch.labels.softmax import log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class JointOptim(FedAvg):
    """alpha, beta  weights of the prior and of the entropy
    history      predictions of a sample whose mean is its label
    warm_up      rounds before labels change
    hard         labels are single classes
    """

    alpha: float = 1.2
    beta: float = 0.8
    history: int = 15
    warm_up: int = 24
    hard: bool = False

    per_sample: ClassVar[frozenset[str]] = frozenset({"labels", "predicted", "seen"})

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta, self.warm_up) < 0 or self.history < 1:
            raise ValueError(
                f"need alpha, beta and warm_up >= 0 and history >= 1, got {self.alpha}, {self.beta}, {self.warm_up} "
                f"and {self.history}"
            )

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        return {
            "labels": F.one_hot(data.y, network.classes).float(),
            "predicted": torch.zeros(*data.y.shape, self.history, network.classes),
            "seen": torch.zeros_like(data.y),
        }

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        log_p = log_softmax(out.logits)
        p = log_p.exp()
        seen = batch.take(visit.kept["seen"])
        batch.put(visit.kept["predicted"], p.detach(), seen % self.history)
        batch.put(visit.kept["seen"], seen + 1)
        each = -((batch.take(visit.kept["labels"]) + self.beta * p) * log_p).sum(-1)  # CE(s, p) + beta H(p)
        prior = uniform_prior((p * batch.weight[..., None]).sum(1))
        return batch_mean(each, batch) + self.alpha * batch.live * prior

    def end_epoch(self, visit: Visit, rows: Tensor, epoch: int) -> None:
        if visit.round < self.warm_up:
            return
        kept, made = visit.kept, visit.kept["seen"].clamp(1, self.history)
        labels = kept["predicted"].sum(2) / made[..., None]
        if self.hard:
            labels = F.one_hot(labels.argmax(-1), labels.shape[-1]).float()
        kept["labels"] = torch.where(kept["seen"][..., None] > 0, labels, kept["labels"])
