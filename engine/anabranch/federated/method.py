"""The steps of a federated method, as FedAvg takes them. Every other method is a class that changes one or two.

    server   first -> send -> ............................................................ -> aggregate
    client            fresh -> begin -> (begin_epoch, samples -> loss_of, slope ... -> end_epoch) ... -> end, reply
    all      survey -> answer of every client -> settle                in the rounds in which the method asks them all

Clients are trained in groups: every tensor has N clients in front, and nothing may pass from one of them to another. So
the same steps run for thousands of clients in one computation, for one client alone, and on a device far away.

FedAvg: McMahan et al., arXiv 1602.05629.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.networks.layout import Network, Output, Views, forward
from anabranch.federated.packed import Batch, Packed
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams
from anabranch.labels.softmax import log_softmax

Tensors = Mapping[str, Tensor]
PIECE = 256  # samples of a client looked at together when none is learned from


@dataclass(slots=True, kw_only=True)
class Visit:
    """A group of N clients in one round; W networks each.

    round       from 0
    clients     [N] int64      their numbers
    data        their samples
    received    [W * N, D]     the rows they begin with, network after network
    sent        [N, ...]       what the method's server sent beside the model
    kept        [N, ...]       what the clients keep from one visit to the next; one entry a sample: [N, n, ...]
    streams     their random numbers
    notes       [N, ...] or [W * N, ...]  what the method writes down until the visit ends
    statistics  [W * N, S]     of the latest pass in training, None if the network has none
    leaves      rows whose tensors are leaves of autograd, and these; while a single row's slope is computed
    latest      rows and x of that pass and what came out
    """

    network: Network
    schedule: Schedule
    round: int
    clients: Tensor
    data: Packed
    received: Tensor
    sent: Tensors
    kept: dict[str, Tensor]
    streams: Streams
    notes: dict[str, Tensor] = field(default_factory=dict)
    statistics: Tensor | None = None
    leaves: tuple[Tensor, Views] | None = None
    latest: tuple[Tensor, Tensor, Output] | None = None

    def see(self, rows: Tensor, x: Tensor, *, training: bool = True) -> Output:
        """What the networks of rows [W * N, D] say of x [N, B, ...]: [W * N, B, ...]."""
        copies = len(rows) // len(x)
        repeated = x.repeat(copies, *[1] * (x.ndim - 1)) if copies > 1 else x
        out = forward(self.network, rows, repeated, training=training, views=self.views(rows))
        if training:
            self.statistics, self.latest = out.statistics, (rows, x, out)
        return out

    def views(self, rows: Tensor) -> Views:
        """The tensors of rows [W * N, D] by name."""
        if self.leaves is not None and rows is self.leaves[0]:
            return self.leaves[1]
        return self.network.layout.views(rows)

    def review(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [W * N, n, C] and features [W * N, n, d] of all samples, in evaluation and without gradients."""
        with torch.no_grad():
            pieces = [self.see(rows, x, training=False) for x in self.data.x.split(PIECE, 1)]
        return torch.cat([out.logits for out in pieces], 1), torch.cat([out.features for out in pieces], 1)

    def features(self, rows: Tensor, x: Tensor) -> Tensor:
        """[W * N, B, d] of x in training: those of the latest pass, if it was of these very rows and x."""
        if self.latest is None or self.latest[0] is not rows or self.latest[1] is not x:
            statistics = self.statistics
            self.see(rows, x)
            self.statistics = statistics  # the method's own pass is the one that counts
        assert self.latest is not None
        return self.latest[2].features


class Replies(NamedTuple):
    """What came back from the m clients of a round, in the order of their numbers.

    clients   [m] int64
    counts    [m] int64          samples of each
    models    [m, W, D] float32  None if the method needs only their mean
    mean      [W, D] float32     weighted by `counts`
    lengths   [m, W] float64     squared distance of each model from the one that was sent, in what is trained
    extra     [m, ...]           what `reply` gave beside the model
    """

    clients: Tensor
    counts: Tensor
    models: Tensor | None
    mean: Tensor
    lengths: Tensor
    extra: Tensors

    @property
    def weights(self) -> Tensor:
        """[m] float64, with sum one: shares of the samples."""
        return self.counts.double().div(self.counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg:
    """Local SGD on cross-entropy; the mean of the models, weighted by their clients' samples.

    mean        a robust rule in the place of the mean of a round's models; None for the mean, which also is a sum
    networks    W: networks that the federation trains
    needs_all   the server needs all models of a round at once, not only their mean
    per_sample  names in `kept` that have one entry for each sample
    uneven      names in `reply` of which a client has as many things as it likes, [N, things, ...]: zeros fill them up
    """

    mean: AggregateMethod | None = None

    networks: ClassVar[int] = 1
    needs_all: ClassVar[bool] = False
    per_sample: ClassVar[frozenset[str]] = frozenset()
    uneven: ClassVar[frozenset[str]] = frozenset()

    def network(self, base: Network) -> Network:
        """What is trained where `base` was asked for, such as the same with more heads."""
        return base

    def vote(self, logits: Tensor) -> Tensor:
        """What the method predicts, logits [V, T, C], of what its networks say, [W, T, C]: each for itself, V = W."""
        return logits

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        """What the server knows before the first round, beside "model" [W, D]."""
        return {}

    def send(self, server: Tensors, clients: Tensor, round: int) -> dict[str, Tensor]:
        """[N, ...]: what each of these clients gets beside the model."""
        return {}

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        """[N, ...]: what clients keep before their first visit."""
        return {}

    def begin(self, visit: Visit, rows: Tensor) -> None:
        """Before the first epoch."""

    def begin_epoch(self, visit: Visit, rows: Tensor, epoch: int) -> None:
        """Before each epoch."""

    def samples(self, visit: Visit) -> Packed:
        """What an epoch goes through; `batch.which` counts these."""
        return visit.data

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        """[W * N]: what each network descends; a mean over the samples that count.

        Methods to which one look at the batch is enough change `loss_of` instead, for which there is a faster way.
        """
        return self.loss_of(visit, visit.see(rows, batch.x), batch)

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        """[W * N]: the loss, if all its slopes are those of what the networks say of the batch, logits and features."""
        return batch_mean(cross_entropy(out.logits, batch.y), batch)

    def slope(self, visit: Visit, rows: Tensor, slopes: list[Tensor]) -> list[Tensor]:
        """What SGD goes down, of the loss's own slopes: tensors [W * N, ...] that are side by side a row's slope."""
        return slopes

    def end_epoch(self, visit: Visit, rows: Tensor, epoch: int) -> None:
        """After each epoch."""

    def end(self, visit: Visit, rows: Tensor) -> Tensor:
        """The rows that the clients send, after the last epoch."""
        return rows

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        """[N, ...]: what each client sends beside its model."""
        return {}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        """What the server knows after the round; at least a new "model" [W, D]."""
        return {**server, "model": replies.mean}

    def survey(self, round: int) -> bool:
        """Whether every client is asked something before this round."""
        return False

    def answer(self, visit: Visit) -> dict[str, Tensor]:
        """[N, ...]: what clients answer to a survey; `visit.received` is the model."""
        return {}

    def settle(self, server: Tensors, answers: Tensors, round: int) -> dict[str, Tensor]:
        """What the server knows after a survey, answers [K, ...] of all clients."""
        return dict(server)


def changes(method: FedAvg, *steps: str) -> list[str]:
    """Which of these steps a method takes in another way than FedAvg."""
    return [step for step in steps if getattr(type(method), step) is not getattr(FedAvg, step)]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each sample: logits [W * N, B, C], y [N, B] int64 or probabilities [N, B, C] -> [W * N, B]."""
    copies = len(logits) // len(y)
    y = y.repeat(copies, *[1] * (y.ndim - 1)) if copies > 1 else y
    log_p = log_softmax(logits)
    if y.ndim == 3:
        return -(y * log_p).sum(-1)
    return -log_p.gather(-1, y[..., None]).squeeze(-1)


def batch_mean(values: Tensor, batch: Batch) -> Tensor:
    """Over the samples of a batch that count: [W * N, B] -> [W * N]."""
    copies = len(values) // len(batch.weight)
    weight = batch.weight.repeat(copies, 1) if copies > 1 else batch.weight
    return (values * weight).sum(-1)
