"""SELFIE: learn from small losses, and from samples of which the network always says the same. ICML 2019

From round `warm_up` on, in each batch:
    clean          all but the share `rate` with the largest losses
    refurbishable  the latest q = `history` predictions have an entropy of at most `threshold` log C; the label is
                   their mode then
    loss           mean cross-entropy over clean and refurbishable samples, nothing of others

From the paper       the two sets (Song, Kim and Lee, "SELFIE: Refurbishing Unclean Samples for Robust Deep Learning").
From its code        FNBench's rate = 0.2, q = 15, threshold = 0.05 (of ten classes, 15 predictions all have to be one);
                     the prediction of the step itself counts. Not taken over: its history begins as zeros, as if
                     class 0 had been predicted; it keeps a refurbished label until another is agreed on; and it looks
                     at the chosen samples again before the step, which is the same without batch statistics.
Reconstructed here   a sample is refurbishable once q predictions of it were made: clients that are visited now and then
                     may have fewer when warming up is over.
Shared               labels/agreement.py and labels/selection.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.packed import Batch, Packed
from anabranch.labels.agreement import agreement
from anabranch.labels.selection import mean_of, small_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class SELFIE(FedAvg):
    """rate       share of labels that are thought to be wrong
    history    predictions of a sample that are remembered
    threshold  of their entropy, as a share of the largest; negative: nothing is refurbished
    warm_up    rounds of plain training
    """

    rate: float = 0.2
    history: int = 15
    threshold: float = 0.05
    warm_up: int = 24

    per_sample: ClassVar[frozenset[str]] = frozenset({"predicted", "seen"})

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1 or self.history < 1 or self.warm_up < 0:
            raise ValueError(
                f"need rate in [0, 1), history >= 1 and warm_up >= 0, got {self.rate}, {self.history} and "
                f"{self.warm_up}"
            )

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        predicted = torch.zeros(*data.y.shape, self.history, dtype=torch.int32)
        return {"predicted": predicted, "seen": torch.zeros_like(data.y)}

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        logits = out.logits
        seen = batch.take(visit.kept["seen"])
        batch.put(visit.kept["predicted"], logits.argmax(-1).int(), seen % self.history)
        batch.put(visit.kept["seen"], seen + 1)
        each = cross_entropy(logits, batch.y)
        if visit.round < self.warm_up:
            return batch_mean(each, batch)
        mode, wavering = agreement(batch.take(visit.kept["predicted"]), logits.shape[-1])
        agreed = batch.real & (seen + 1 >= self.history) & (wavering <= self.threshold)
        chosen = small_losses(each.detach(), batch.real, self.rate) | agreed
        each = cross_entropy(logits, torch.where(agreed, mode, batch.y))
        return batch_mean(each, batch._replace(weight=mean_of(chosen)))
