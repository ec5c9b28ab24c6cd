"""FedELC: noisy clients are found by their class losses and learn their labels together with the network.

    clean clients   CE(z + tau log pi, y)
    noisy clients   KL(r || s) / C + alpha CE(s, y) + beta H(r) / C     r = softmax(z), s = softmax(t)
                    t, logits of the labels, begin as 10 onehot(y); once an epoch t -= lambda dL/dt of the batch's mean;
                    after the last epoch t = 10 (s + r of the trained network) / 2
    server          distance-aware aggregation (distance_aware.py)

Jiang et al., CIKM 2024, arXiv 2408.04301; the learning of labels is PENCIL's, 1903.07788.

From its code        all numbers; 20 rounds of the first stage. lambda is 1000 for batches of 64.
Reconstructed here   a label takes its step when its sample has been seen, which is the same, as each is seen once an
                     epoch; the last epoch's labels take theirs, too. With `drop_last` a sample that is left out keeps
                     its label for that epoch, as in the code. The step is `label_step` = lambda / B of the sample's own
                     loss, so that it does not grow in a small batch. The trained network speaks in evaluation, of
                     pictures as they are.
Shared               labels/learned.py has the loss and its slopes; the stages (two_stages.py) and the aggregation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.federated.distance_aware import distance_aware
from anabranch.federated.method import Replies, Tensors, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.packed import Batch, Packed
from anabranch.federated.two_stages import TwoStages
from anabranch.labels.learned import first_labels, merged, slopes


@dataclass(frozen=True, slots=True, kw_only=True)
class FedELC(TwoStages):
    """alpha, beta   of the loss
    certainty     of first and merged labels
    label_step    down each sample's own loss: the published 1000 on means of 64; nothing for 0
    merge         halve the learned labels with what the network says, after each visit
    learn         labels at all; without it noisy clients train as the others do
    """

    alpha: float = 0.5
    beta: float = 0.2
    certainty: float = 10.0
    label_step: float = 1000 / 64
    merge: bool = True
    learn: bool = True

    per_sample: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        TwoStages.__post_init__(self)
        if min(self.alpha, self.beta, self.label_step) < 0 or not self.certainty > 0:
            raise ValueError(
                "need alpha, beta, label_step >= 0 and certainty > 0, got "
                f"{self.alpha}, {self.beta}, {self.label_step}, {self.certainty}"
            )

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        """labels [N, n, C] float32: t, beside what the stages keep."""
        return {**TwoStages.fresh(self, network, data), "labels": first_labels(data.y, network.classes, self.certainty)}

    def learns(self, visit: Visit) -> Tensor:
        """[N] bool: clients that learn their labels in this visit."""
        noisy: Tensor = visit.sent["noisy"]
        return noisy & self.learn

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        logits, learns = out.logits, self.learns(visit)
        given = batch_mean(cross_entropy(self.adjusted(visit, logits), batch.y), batch)
        if not bool(learns.any()):
            return given
        labels = visit.kept["labels"]
        at = (torch.arange(len(labels))[:, None], batch.which)
        found = slopes(logits, labels[at], batch.y, self.held(logits.detach(), batch), alpha=self.alpha, beta=self.beta)
        labels[at] -= self.label_step * found.labels * (batch.real & learns[:, None])[..., None]
        with_slope = found.loss + ((logits - logits.detach()) * found.logits).sum(-1)
        return torch.where(learns, batch_mean(with_slope, batch), given)

    def held(self, logits: Tensor, batch: Batch) -> Tensor:
        """[N, B] bool: samples whose learned labels are held to the given ones."""
        return batch.real

    def end(self, visit: Visit, rows: Tensor) -> Tensor:
        learns = self.learns(visit)
        if self.merge and bool(learns.any()):
            labels = visit.kept["labels"]
            new = merged(labels, visit.review(rows)[0], self.certainty)
            visit.kept["labels"] = torch.where(learns[:, None, None], new, labels)
        return rows

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        return {**server, "model": distance_aware(server, replies)}
