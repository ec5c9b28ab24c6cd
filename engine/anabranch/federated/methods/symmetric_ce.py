"""Symmetric cross-entropy: a bounded loss beside the unbounded one, so that no label is worth any price.

arXiv 1908.06112

    alpha CE(p, y) + beta RCE(p, y)        RCE = 9.2103 (1 - p_y), the cross-entropy of labels against predictions

From the paper   the sum; log 0 is a constant there, too.
From its code    alpha = 0.1, beta = 1 and log 1e-4 are FNBench's.
Shared           labels/losses.py.
"""

from dataclasses import dataclass

from torch import Tensor

from anabranch.federated.method import FedAvg, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Output
from anabranch.federated.packed import Batch
from anabranch.labels.losses import reverse_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricCE(FedAvg):
    """alpha, beta: weights of cross-entropy and of its reverse."""

    alpha: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not min(self.alpha, self.beta) >= 0:
            raise ValueError(f"alpha and beta must not be negative, got {self.alpha} and {self.beta}")

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        forward = cross_entropy(out.logits, batch.y)
        return batch_mean(self.alpha * forward + self.beta * reverse_cross_entropy(forward), batch)
