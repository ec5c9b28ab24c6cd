"""FedRN: a client asks the networks of reliable neighbours, too, which of its labels are clean. arXiv 2205.01310

    expertise_k  accuracy of client k's network on its own labels      o_k  what it says of one fixed noise sample
    score_kj = alpha expertise_j + (1 - alpha) cos(o_k, o_j),  both scaled to [0, 1] over clients;  score_kk likewise
    the neighbours are the clients j of largest score; their last layers are tuned on k's clean samples for an epoch
    clean_k  samples whose mean probability of being clean, by k's and the neighbours' losses, weighted by the scores,
             exceeds 1/2;  all samples if there is none

From round `warm_up` on clients train on their clean samples alone, until then it is FedAvg. The server keeps the
network that each client sent last; own and neighbours' networks are those.

From the paper       reliability by expertise and similarity, mixtures of losses, tuned heads.
From FNBench         arXiv 2505.06684: one neighbour, alpha = 0.6, 24 rounds of warm-up of 120.
Reconstructed here   clients that were never visited are nobody's neighbours (the code takes random networks), and take
                     the model that came in for their own, with an expertise of 1/2; equal values all scale to 1. Heads
                     are tuned on features of evaluation. For texts the noise sample is one known word, id 1.
Privacy              clients see networks of others, as trained on their data.
Shared               labels/mixtures.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.method import FedAvg, Replies, Tensors, Visit, cross_entropy
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import Batch, Packed, epoch, subset, with_samples
from anabranch.federated.streams import NOBODY, Purpose, Streams
from anabranch.labels.mixtures import clean_posteriors
from anabranch.labels.softmax import softmax

UNKNOWN = 0.5  # expertise of a client before its first visit
CLEAN = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FedRN(FedAvg):
    """warm_up     rounds of FedAvg
    neighbours  that a client asks
    alpha       weight of expertise beside similarity, below 1
    """

    needs_all: ClassVar[bool] = True

    warm_up: int = 24
    neighbours: int = 1
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.warm_up < 0 or self.neighbours < 0 or not 0 <= self.alpha < 1:
            raise ValueError(
                f"need warm_up, neighbours >= 0 and alpha in [0, 1), got {self.warm_up}, {self.neighbours}, "
                f"{self.alpha}"
            )

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        return {
            "models": torch.zeros(clients, network.layout.size),
            "expertise": torch.full((clients,), UNKNOWN),
            "noise": torch.zeros(clients, network.classes),
            "visited": torch.zeros(clients, dtype=torch.bool),
        }

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        """networks [N, 1 + neighbours, D], a client's own first, and trust [N, 1 + neighbours], with sum one."""
        if round < self.warm_up:
            return {}
        models, visited = server["models"], server["visited"]
        who, trust = neighbours(server["expertise"], server["noise"], visited, clients, self.neighbours, self.alpha)
        own = torch.where(visited[clients, None], models[clients], server["model"])
        return {"networks": torch.cat([own[:, None], models[who]], 1), "trust": trust}

    def begin(self, visit: Visit, rows: Tensor) -> None:
        if "networks" not in visit.sent:
            return
        data, real = visit.data, visit.data.real
        own, *others = visit.sent["networks"].unbind(1)
        clean = clean_posteriors(cross_entropy(visit.review(own)[0], data.y), real)
        trusted = clean * visit.sent["trust"][:, :1]
        clean = or_all(clean > CLEAN, real)
        for i, other in enumerate(others, 1):
            losses = cross_entropy(self._tuned(visit, other, clean), data.y)
            trusted += clean_posteriors(losses, real) * visit.sent["trust"][:, i : i + 1]
        visit.notes["clean"] = or_all(trusted > CLEAN, real)

    def samples(self, visit: Visit) -> Packed:
        return subset(visit.data, visit.notes["clean"]) if "clean" in visit.notes else visit.data

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        data = visit.data
        right = (visit.review(rows)[0].argmax(-1) == data.y) & data.real
        noise = noise_sample(data.source[data.owned[0, 0]], visit.schedule.seed)
        with torch.no_grad():
            said = visit.see(rows, noise.expand(len(rows), 1, *noise.shape), training=False).logits[:, 0]
        return {"expertise": right.sum(1) / data.counts, "noise": said}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        assert replies.models is not None
        who = replies.clients
        news = {"models": replies.models[:, 0], **{name: replies.extra[name] for name in ("expertise", "noise")}}
        after = {name: server[name].index_copy(0, who, value) for name, value in news.items()}
        return {**server, **after, "model": replies.mean, "visited": server["visited"].index_fill(0, who, True)}

    def _tuned(self, visit: Visit, rows: Tensor, clean: Tensor) -> Tensor:
        """Logits [N, n, C] of networks [N, D] whose last layers learned from clean samples [N, n] bool for an epoch."""
        schedule, layout = visit.schedule, visit.network.layout
        features = F.pad(visit.review(rows)[1], (0, 1), value=1.0)  # biases are weights of a feature that is one
        weight, bias = (layout.views(rows)[name] for name in layout.head)
        head = torch.cat([weight, bias[:, None]], 1)
        velocity = torch.zeros_like(head)
        chosen = subset(with_samples(visit.data, features), clean)
        # an order of its own: training has `epochs` of them
        for batch in epoch(chosen, visit.streams, schedule.epochs, size=schedule.batch, drop_last=schedule.drop_last):
            velocity = schedule.momentum * velocity + slope_of_head(head, batch) + schedule.weight_decay * head
            head = head - schedule.lr * velocity * batch.live[:, None, None]
        return features @ head


def neighbours(
    expertise: Tensor, noise: Tensor, visited: Tensor, clients: Tensor, most: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """Whom clients [N] ask, [N, k], and how much they trust themselves and each of those, [N, 1 + k].

    expertise, noise, visited  [K], [K, C], [K] bool   what is known of all clients
    k is `most`, or fewer if there are no more clients; one who was never visited is trusted with nothing.
    """
    skill = scaled(expertise, visited)
    alike = scaled(F.cosine_similarity(noise[clients, None], noise, dim=-1), visited)
    scores = (alpha * skill + (1 - alpha) * alike).masked_fill(~visited, -1.0)
    scores = scores.scatter(1, clients[:, None], -1.0)
    best, who = scores.sort(dim=1, descending=True, stable=True)
    k = min(most, len(expertise) - 1)
    own = alpha * skill[clients, None] + (1 - alpha)
    trust = torch.cat([own, best[:, :k].clamp_min(0)], 1)
    return who[:, :k], trust / trust.sum(1, keepdim=True)


def scaled(values: Tensor, known: Tensor) -> Tensor:
    """values [..., K] to [0, 1], the ends being those that are known [K] bool; 1 where these are all equal."""
    low = values.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~known, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low), 1.0).clamp(0, 1)


def or_all(chosen: Tensor, real: Tensor) -> Tensor:
    """The chosen [N, n] bool among the real, or all real ones in rows without any."""
    chosen = chosen & real
    return torch.where(chosen.any(1, keepdim=True), chosen, real)


def slope_of_head(head: Tensor, batch: Batch) -> Tensor:
    """Of the mean cross-entropy of features batch.x [N, B, d + 1], in a last layer [N, d + 1, C]."""
    p = softmax(batch.x @ head)
    return batch.x.mT @ ((p - F.one_hot(batch.y, head.shape[2])) * batch.weight[..., None])


def noise_sample(like: Tensor, seed: int) -> Tensor:
    """One and the same sample for all clients of a federation, of the shape and dtype of another."""
    if not like.is_floating_point():
        return F.one_hot(torch.zeros((), dtype=torch.int64), like.numel()).view_as(like)
    return Streams(seed, torch.tensor([NOBODY]), 0).normal(like.numel(), Purpose.METHOD)[0].view_as(like)
