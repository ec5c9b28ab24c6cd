"""FedCFA: training on counterfactual latents, so that a client's shortcuts are not learnt. AAAI 2025, arXiv 2412.18904

A client's latents h [F factors, ...] meet those of mean samples of the clients of the last round, hg = encode(xg):

    a = mean over space of the slope of the label's logit, by the model that was received, in h
    positive   hp = h but its k least a from hg, label kept                   (what does not matter is exchanged)
    negative   hn = h but its k largest a from hg, label (1 - k/F) y + k/F yg      (what matters is exchanged)
    L = w0 CE(h, y) + w1 CE(hp, y) + w2 CE(hn, mixed) + lc * mean over i != j of corr(u_i, u_j)^2,  u = mean of h

h and hg carry no gradient into hp and hn, so these train the upper part alone.

From the paper       counterfactuals by exchanging factors with global means, decorrelated factors.
From its code        signed importance, 24 of 64 factors, weights 1 : 5 : 5, means over 128 samples, the last round's.
Reconstructed here   the decorrelation (the code parses lc = 0.1 and never uses it): squared by default, or absolute.
Deviations           passes beside the first leave batch statistics alone (the code's update them with mixed latents);
                     the last, smaller group of a client's means counts. Means of few samples show them: `group` limits
                     privacy, too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Replies, Tensors, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import Batch, Packed
from anabranch.federated.streams import Purpose

CHOICES = ("signed", "absolute", "random")
MEANS = 1 << 20  # the order in which samples are grouped to means is none of an epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class FedCFA(FedAvg):
    """weights        of the samples, the positive and the negative counterfactuals
    replaced       share of the factors that are exchanged, k / F
    choice         by "signed" importance, its "absolute" value, or "random": what choosing is worth
    decorrelation  lc
    squared        correlations are squared; otherwise their absolute values count
    group          samples of one mean
    """

    uneven: ClassVar[frozenset[str]] = frozenset({"mean_x", "mean_y", "size"})

    weights: tuple[float, float, float] = (1.0, 5.0, 5.0)
    replaced: float = 0.375
    choice: str = "signed"
    decorrelation: float = 0.1
    squared: bool = True
    group: int = 128

    def __post_init__(self) -> None:
        if len(self.weights) != 3 or min(self.weights) < 0 or self.decorrelation < 0:
            raise ValueError(f"weights are three numbers >= 0, as is decorrelation, got {self.weights}")
        if not 0 <= self.replaced <= 1 or self.choice not in CHOICES or self.group < 1:
            raise ValueError(
                f"need replaced in [0, 1], choice one of {CHOICES} and group >= 1, got {self.replaced}, "
                f"{self.choice!r}, {self.group}"
            )

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        means = {name: server[name] for name in ("mean_x", "mean_y") if name in server}
        return {name: x.expand(len(clients), *x.shape) for name, x in means.items()}

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        own, positive, negative = self.weights
        out = visit.see(rows, batch.x)
        loss = own * batch_mean(cross_entropy(out.logits, batch.y), batch)
        if self.decorrelation:
            factors = out.latent.flatten(3).mean(3) if out.latent.ndim > 3 else out.latent
            loss = loss + self.decorrelation * dependence(factors, batch.weight, squared=self.squared)
        if "mean_x" not in visit.sent or not (positive or negative):
            return loss
        h = out.latent.detach()
        F = h.shape[2]
        k = round(self.replaced * F)
        views = visit.network.layout.views(rows)
        hg, yg = self._drawn(visit, rows, batch)
        importance = self._importance(visit, h, batch)
        least, largest = (importance.topk(k, -1, largest=most).indices for most in (False, True))
        one_hot = torch.nn.functional.one_hot(batch.y, visit.network.classes).float()
        mixed = (1 - k / F) * one_hot + k / F * yg
        for weight, chosen, label in ((positive, least, one_hot), (negative, largest, mixed)):
            logits, _, _ = visit.network.decode(views, exchanged(h, hg, chosen), training=False)
            loss = loss + weight * batch_mean(cross_entropy(logits, label), batch)
        return loss

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        return means_of_groups(visit.data, self.group, visit.network, self._order(visit))

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        there = replies.extra["size"] > 0
        means = {name: replies.extra[name][there] for name in ("mean_x", "mean_y")}
        return {**server, **means, "model": replies.mean}

    def _order(self, visit: Visit) -> Tensor:
        return visit.streams.order(visit.data.counts, visit.data.y.shape[1], MEANS)

    def _drawn(self, visit: Visit, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each sample a mean at random: its latent by the model as it is now, and its label."""
        x, y = visit.sent["mean_x"], visit.sent["mean_y"]
        N, B = batch.y.shape
        drawn = (visit.streams.uniform(B, Purpose.MIX, batch.number) * x.shape[1]).long().clamp_max(x.shape[1] - 1)
        who = torch.arange(N)[:, None]
        with torch.no_grad():
            views = visit.network.layout.views(rows)
            latent, _ = visit.network.encode(views, x[who, drawn], training=False)
        return latent, y[who, drawn]

    def _importance(self, visit: Visit, h: Tensor, batch: Batch) -> Tensor:
        """[N, B, F]: how a factor moves the label's logit, by the model that was received."""
        if self.choice == "random":
            drawn = visit.streams.uniform(h.shape[1] * h.shape[2], Purpose.METHOD, batch.number)
            return drawn.view(h.shape[:3])
        h = h.requires_grad_()
        with torch.enable_grad():
            logits, _, _ = visit.network.decode(visit.network.layout.views(visit.received), h, training=False)
            (slope,) = torch.autograd.grad(logits.gather(2, batch.y[..., None]).sum(), h)
        slope = slope.flatten(3).mean(3) if slope.ndim > 3 else slope
        return slope.abs() if self.choice == "absolute" else slope


def exchanged(h: Tensor, other: Tensor, chosen: Tensor) -> Tensor:
    """h [N, B, F, ...] with the chosen factors [N, B, k] of `other`."""
    mask = torch.zeros(h.shape[:3], dtype=torch.bool).scatter_(2, chosen, True)
    return torch.where(mask.view(*h.shape[:3], *[1] * (h.ndim - 3)), other, h.detach())


def dependence(factors: Tensor, weight: Tensor, *, squared: bool = True) -> Tensor:
    """[N]: mean over pairs of factors of their squared (or absolute) correlation over a batch.

    factors [N, B, F]; weight [N, B] is 1 / size of the batch for samples that count, else 0. A constant factor
    correlates with none.
    """
    F = factors.shape[2]
    centred = factors - (factors * weight[..., None]).sum(1, keepdim=True)
    centred = centred * weight[..., None].sqrt()
    spread = centred.square().sum(1, keepdim=True)
    unit = centred * torch.where(spread > 1e-12, spread, torch.inf).rsqrt()
    correlations = unit.mT @ unit
    off = correlations * (1 - torch.eye(F))
    return (off.square() if squared else off.abs()).sum((1, 2)) / (F * max(F - 1, 1))


def means_of_groups(data: Packed, size: int, network: Network, order: Tensor) -> dict[str, Tensor]:
    """Means of groups of `size` samples of each client, the last of what is left.

    order    [N, n]: samples as they are grouped, a client's own first
    returns  mean_x [N, G, ...], mean_y [N, G, C] shares of the classes, size [N, G]; zeros beyond a client's groups

    Raises ValueError for samples that have no mean, such as words.
    """
    if not data.source.is_floating_point():
        raise ValueError(f"FedCFA sends means of samples, which {data.source.dtype} samples do not have")
    N, n = data.y.shape
    G = -(-n // size)
    real = data.real
    who, group = torch.arange(N)[:, None].expand(N, n)[real], (torch.arange(n) // size).expand(N, n)[real]
    place, mine = who * G + group, order[real]
    sizes = torch.bincount(place, minlength=N * G)
    y = torch.nn.functional.one_hot(data.y[who, mine], network.classes).float()
    sums = {"mean_x": data.source[data.owned[who, mine]], "mean_y": y}
    means = {}
    for name, values in sums.items():
        total = values.new_zeros(N * G, *values.shape[1:]).index_add_(0, place, values)
        divisor = sizes.clamp_min(1).view(-1, *[1] * (values.ndim - 1))
        means[name] = (total / divisor).unflatten(0, (N, G))
    return {**means, "size": sizes.view(N, G)}
