"""Two stages: clients learn a first model, it tells which of them have wrong labels, and these go on in another way.

    rounds before `warmup`   every client: CE(z + tau log pi_k, y), pi_k the classes' shares of its labels
    before round `warmup`    every client answers with its mean loss on each class, C numbers and C counts; by these the
                             server finds the noisy ones (noisy_clients.py), once and for all
    from then on             the others go on as before; what noisy ones do is the method's

Not as in the code   it takes these losses from a copy of all data that the server has, with augmentation. Here each
                     client computes its row, from pictures as they are.
Shared               federated/methods/fednoro.py, fedelc.py, maskedoptim.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Tensors, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.noisy_clients import COVARIANCES, noisy_clients, scaled
from anabranch.federated.packed import Batch, Packed
from anabranch.labels.logit_adjustment import class_counts, log_prior


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStages(FedAvg):
    """The first stage and what leads to the second; noisy clients go on like the others.

    warmup      rounds of the first stage
    tau         of the logit adjustment
    covariance, added, separated
                of the search for noisy clients
    """

    warmup: int = 20
    tau: float = 1.0
    covariance: str = "full"
    added: float = 1e-6
    separated: bool = False

    needs_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.tau < 0:
            raise ValueError(f"need warmup >= 1 and tau >= 0, got {self.warmup} and {self.tau}")
        if self.covariance not in COVARIANCES:
            raise ValueError(f"unknown covariance {self.covariance!r}; choose one of {list(COVARIANCES)}")
        if not self.added > 0:
            raise ValueError(f"what is added to variances must be positive, got {self.added}")

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        """noisy [K] bool: nobody yet; sizes [L] int64: of the tensors of a row, for what is done tensor by tensor."""
        if clients < 2:
            raise ValueError(f"noisy clients are told from others, so there must be two at least, got {clients}")
        return {"noisy": torch.zeros(clients, dtype=torch.bool), "sizes": torch.tensor(network.layout.sizes)}

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        return {"noisy": server["noisy"][clients]}

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        return {"log_prior": log_prior(class_counts(data.y, data.real, network.classes))}

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        return batch_mean(cross_entropy(self.adjusted(visit, out.logits), batch.y), batch)

    def adjusted(self, visit: Visit, logits: Tensor) -> Tensor:
        return logits + self.tau * visit.kept["log_prior"][:, None]

    def survey(self, round: int) -> bool:
        return round == self.warmup

    def answer(self, visit: Visit) -> dict[str, Tensor]:
        """losses [N, C] float32, zero for a class without samples, and counts [N, C] int64."""
        y, real, C = visit.data.y, visit.data.real, visit.network.classes
        each = cross_entropy(visit.review(visit.received)[0], y) * real
        counts = class_counts(y, real, C)
        sums = torch.zeros(len(y), C, dtype=torch.float64).scatter_add_(1, y, each.double())
        return {"losses": (sums / counts.clamp_min(1)).float(), "counts": counts}

    def settle(self, server: Tensors, answers: Tensors, round: int) -> dict[str, Tensor]:
        rows = scaled(answers["losses"], answers["counts"])
        noisy = noisy_clients(rows, covariance=self.covariance, added=self.added, separated=self.separated)
        return {**server, "noisy": noisy}
