"""Forward correction: the labels that one transition matrix makes of what is predicted are fitted. arXiv 1609.03683

    L = -log (p T)_y,  p = softmax(z)         T_ij: class i is labelled j, of all samples and clients

`matrix` is "symmetric:RATE" or "pairflip:RATE" where T is known, or "anchors": after `warm_up` rounds of FedAvg the
sample a_i that is most probably of class i shows T_i = p(a_i), as its label cannot but be spoiled like the class's.

From the paper       the loss; T from anchors (Patrini et al.).
Reconstructed here   in a federation each client sends the p of its own anchor of each class, and the server takes the
                     most probable of these: that of all samples together. A client sees nothing of others but T.
Shared               labels/transition.py; labels/noise.py has the known matrices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Replies, Tensors, Visit, batch_mean
from anabranch.federated.networks.layout import Network, Output
from anabranch.federated.packed import Batch
from anabranch.labels.noise import pairs, symmetric_matrix, target_matrix
from anabranch.labels.transition import forward_losses

KINDS = ("symmetric", "pairflip")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCorrection(FedAvg):
    """matrix   T: "symmetric:RATE", "pairflip:RATE" or "anchors"
    warm_up  rounds before anchors are looked for
    """

    matrix: str = "anchors"
    warm_up: int = 10

    def __post_init__(self) -> None:
        if self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {self.warm_up}")
        if self.matrix != "anchors":
            parsed(self.matrix)

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        """transition [C, C]: T; the identity until it has been estimated."""
        C = network.classes
        if self.matrix == "anchors":
            return {"transition": torch.eye(C)}
        kind, rate = parsed(self.matrix)
        T = symmetric_matrix(rate, C) if kind == "symmetric" else target_matrix(rate, pairs(C))
        return {"transition": T.float()}

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        return {"transition": server["transition"].expand(len(clients), -1, -1)}

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        return batch_mean(forward_losses(out.logits, visit.sent["transition"][:, None], batch.y), batch)

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        """anchors [N, C, C]: p of a client's anchor of each class; only in the last round of warming up."""
        if self.matrix != "anchors" or visit.round != self.warm_up - 1:
            return {}
        p = visit.review(rows)[0].softmax(-1)
        best = p.masked_fill(~visit.data.real[..., None], -1.0).argmax(1)
        return {"anchors": p.gather(1, best[..., None].expand(-1, -1, p.shape[-1]))}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        after = {**server, "model": replies.mean}
        if "anchors" in replies.extra:
            anchors = replies.extra["anchors"]  # [m, C, C]
            classes = torch.arange(anchors.shape[1])
            after["transition"] = anchors[anchors.diagonal(dim1=1, dim2=2).argmax(0), classes]
        return after


def parsed(matrix: str) -> tuple[str, float]:
    """A known matrix's kind and rate. ValueError says what is allowed."""
    kind, _, rate = matrix.partition(":")
    try:
        if kind in KINDS and 0 <= float(rate) < 1:
            return kind, float(rate)
    except ValueError:
        pass
    raise ValueError(f"matrix is symmetric:RATE, pairflip:RATE (rates below 1) or anchors, got {matrix!r}")
