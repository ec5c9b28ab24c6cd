"""RobustFL: clients and server share where each class lies among the features, and trust labels that lie there.
arXiv 2012.01700

    S   the samples of a batch with the smallest CE(z, y); int(f(t) B) are left out
    nearest_i = argmax_c cos(F_c, h_i)        m_i = [nearest_i = y_i]
    target_i  = y_i if m_i, else what the model that came in says of i; y_i before round `trust`
    L = mean over S of  CE(z_i, target_i) + pull_t m_i |h_i - F_{y_i}|^2 + entropy H(p_i)
    F_c <- (1 - s^2) F_c + s^2 G_c,  s = cos(F_c, G_c)     after each batch; G_c the mean feature of S of class y = c
    server  F_c <- sum_k cos(F_c, F_kc) F_kc / sum_k cos(F_c, F_kc)

f rises as Co-teaching's, pull_t to `pull` in the rounds before `trust`. Features in F, G and nearest carry no gradient.

From the paper       global centroids, guided pseudo-labels, the three losses.
From FNBench         arXiv 2505.06684: weights, rounds, class means as first centroids.
Reconstructed here   the server's first centroids are the plain means of the clients', its code's are random; cosines
                     below zero weigh nothing; a centroid that nobody has is the first one found.
Deviations           the distances are a mean like all else; FNBench's code sums them, but detaches h, so they have no
                     gradient there. `summed` sums them, with a gradient: on the digits SGD does not survive it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.method import FedAvg, Replies, Tensors, Visit, cross_entropy
from anabranch.federated.networks.layout import Output
from anabranch.federated.packed import Batch
from anabranch.labels.selection import forget_rate, mean_of, small_losses
from anabranch.labels.softmax import log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustFL(FedAvg):
    """forget   share of the samples that is left out in the end
    ramp     rounds until then
    trust    the first round in which the incoming model's labels are learned from
    pull     weight of the distance from a class's centroid
    entropy  weight of the entropy
    summed   distances are summed over a batch
    """

    forget: float = 0.2
    ramp: int = 24
    trust: int = 10
    pull: float = 1.0
    entropy: float = 0.8
    summed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.forget < 1 or min(self.ramp, self.trust, self.pull, self.entropy) < 0:
            raise ValueError(
                f"need forget in [0, 1) and the others not negative, got {self.forget}, {self.ramp}, {self.trust}, "
                f"{self.pull}, {self.entropy}"
            )

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        return {"centroids": server["centroids"].expand(len(clients), -1, -1)} if "centroids" in server else {}

    def begin(self, visit: Visit, rows: Tensor) -> None:
        logits, features = visit.review(rows)
        own = class_means(features, visit.data.y, visit.data.real, visit.network.classes)
        visit.notes["pseudo"] = logits.argmax(-1)
        visit.notes["centroids"] = visit.sent.get("centroids", own)

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        forget = forget_rate(visit.round, rate=self.forget, ramp=self.ramp)
        chosen = small_losses(cross_entropy(out.logits, batch.y).detach(), batch.real, forget)
        weight, centroids, features = mean_of(chosen), visit.notes["centroids"], out.features.detach()
        agreed = (F.normalize(features, dim=-1) @ F.normalize(centroids, dim=-1).mT).argmax(-1) == batch.y
        target = batch.y
        if visit.round >= self.trust:
            target = torch.where(agreed, batch.y, visit.notes["pseudo"].gather(1, batch.which))
        own = centroids.gather(1, batch.y[..., None].expand_as(features))
        far = (out.features - own).square().sum(-1) * (agreed & chosen)
        log_p = log_softmax(out.logits)
        unsure = -(log_p.exp() * log_p).sum(-1)
        pull = self.pull * min(1.0, visit.round / self.trust) if self.trust else self.pull
        means = class_means(features, batch.y, chosen, visit.network.classes)
        visit.notes["centroids"] = moved(centroids, means)
        each = (cross_entropy(out.logits, target) + self.entropy * unsure) * weight
        return each.sum(1) + pull * (far if self.summed else far * weight).sum(1)

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        return {"centroids": visit.notes["centroids"]}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        theirs = replies.extra["centroids"]
        ours = server.get("centroids", torch.zeros_like(theirs[0]))
        return {**server, "model": replies.mean, "centroids": gathered(ours, theirs)}


def class_means(features: Tensor, y: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """[N, C, d]: of features [N, B, d] with labels y [N, B], those that are chosen [N, B] bool; zero without any."""
    member = F.one_hot(y, classes) * chosen[..., None]
    return member.float().mT @ features / member.sum(1).clamp_min(1)[..., None]


def moved(centroids: Tensor, means: Tensor) -> Tensor:
    """Centroids [N, C, d] after a batch with means [N, C, d] of its classes, zero of those it lacks."""
    share = F.cosine_similarity(centroids, means, dim=-1).square()[..., None]
    return torch.lerp(centroids, means, torch.where(centroids.any(-1, keepdim=True), share, 1.0))


def gathered(ours: Tensor, theirs: Tensor) -> Tensor:
    """The server's centroids [C, d] after those of m clients [m, C, d] came in."""
    ours, theirs = ours.double(), theirs.double()
    alike = F.cosine_similarity(ours, theirs, dim=-1).clamp_min(0)
    weight = torch.where(ours.any(-1), alike, theirs.any(-1).double())  # [m, C]
    total = weight.sum(0)[:, None]
    mean = (weight[..., None] * theirs).sum(0) / total.clamp_min(1e-12)
    return torch.where(total > 1e-12, mean, ours).float()
