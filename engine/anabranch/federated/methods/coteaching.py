"""Co-teaching: two networks, each learning from the samples of small loss that the other one chose. arXiv 1804.06872

    S_w = the (1 - f(t)) B samples of a batch with the smallest CE(z_w, y)
    L_1 = mean over S_2 of CE(z_1, y)        L_2 = mean over S_1 of CE(z_2, y)

f(t) rises linearly from 0 to `forget` in the first `ramp` rounds. Both networks are averaged over the clients, apart.

From the paper       the exchange, the rising share.
From FNBench         arXiv 2505.06684: 0.2 is forgotten from round 24 of 120 on.
Reconstructed here   time counts rounds, not local epochs.
Deviations           int(f B) samples are left out, where the code keeps int((1 - f) B): one more stays.
Shared               labels/selection.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anabranch.federated.method import FedAvg, Visit, cross_entropy
from anabranch.federated.networks.layout import Output
from anabranch.federated.packed import Batch
from anabranch.labels.selection import forget_rate, mean_of, small_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTeaching(FedAvg):
    """forget  share of the samples that is left out in the end, about that of the wrong labels
    ramp    rounds until then
    """

    networks: ClassVar[int] = 2

    forget: float = 0.2
    ramp: int = 24

    def __post_init__(self) -> None:
        if not 0 <= self.forget < 1 or self.ramp < 0:
            raise ValueError(f"need forget in [0, 1) and ramp >= 0, got {self.forget} and {self.ramp}")

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        logits = out.logits
        losses = cross_entropy(logits, batch.y)
        taught = self.taught(visit, logits.detach(), losses.detach(), batch)
        return (losses * mean_of(taught)).sum(1)

    def taught(self, visit: Visit, logits: Tensor, losses: Tensor, batch: Batch) -> Tensor:
        """[2 N, B] bool: samples from which each network learns."""
        return self.chosen_by_peers(visit, losses, batch.real)

    def chosen_by_peers(self, visit: Visit, losses: Tensor, among: Tensor) -> Tensor:
        """[2 N, B] bool: what the other network would choose among samples [N, B] bool, by its losses [2 N, B]."""
        forget = forget_rate(visit.round, rate=self.forget, ramp=self.ramp)
        return peers(small_losses(losses, among.repeat(2, 1), forget))


def peers(values: Tensor) -> Tensor:
    """[2 N, ...] of two networks, exchanged."""
    return values.roll(len(values) // 2, 0)
