"""Co-teaching+: two networks that teach each other only where they disagree, and so stay different. arXiv 1901.04215

From round `start` on, Co-teaching's exchange takes place among those samples of a batch on which the two predict
different classes. Where they agree on all of a batch, both learn from all of it. Before, it is Co-teaching.

From the paper       disagreement before the exchange.
From FNBench         arXiv 2505.06684: from round 10 on; the cross-entropy of the whole batch where nobody disagrees.
Deviations           FNBench's code feeds probabilities to the cross-entropy, and loses the last sample on which the
                     networks disagree whenever the client's first is among them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.method import Visit
from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.packed import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTeachingPlus(CoTeaching):
    """start   the first round in which agreement is left out"""

    start: int = 10

    def taught(self, visit: Visit, logits: Tensor, losses: Tensor, batch: Batch) -> Tensor:
        if visit.round < self.start:
            return self.chosen_by_peers(visit, losses, batch.real)
        first, second = logits.argmax(-1).chunk(2)
        apart = (first != second) & batch.real
        chosen = self.chosen_by_peers(visit, losses, apart)
        return torch.where(apart.any(1, keepdim=True).repeat(2, 1), chosen, batch.real.repeat(2, 1))
