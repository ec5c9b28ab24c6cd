"""FedELR, experimental: what clients learned early is held against what they memorise late. Neural Networks, 2025

    L = CE(p, y) + lambda log(1 - <p, t>)        t <- momentum t + (1 - momentum) p, of each sample, in every step

Experimental: "FedELR: When federated learning meets learning with noisy labels" has published no code, and its text was
not at hand. This is early-learning regularisation (arXiv 2007.00151) inside each client.

From ELR             the penalty, t from zero, p kept 1e-4 away from 0 and 1, about these lambda and momentum.
Reconstructed here   t stays with the client from one visit to the next; all that FedELR does to bring the early phases
                     of clients and server together is missing.
Shared               labels/losses.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.packed import Batch, Packed
from anabranch.labels.losses import early_learning


@dataclass(frozen=True, slots=True, kw_only=True)
class FedELR(FedAvg):
    """strength: lambda. momentum: of what was predicted so far."""

    strength: float = 3.0
    momentum: float = 0.7

    per_sample: ClassVar[frozenset[str]] = frozenset({"early"})

    def __post_init__(self) -> None:
        if not self.strength >= 0 or not 0 <= self.momentum <= 1:
            raise ValueError(f"need strength >= 0 and momentum in [0, 1], got {self.strength} and {self.momentum}")

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        return {"early": torch.zeros(*data.y.shape, network.classes)}

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        logits = out.logits
        penalty, early = early_learning(logits, batch.take(visit.kept["early"]), self.momentum)
        batch.put(visit.kept["early"], early)
        return batch_mean(cross_entropy(logits, batch.y) + self.strength * penalty, batch)
