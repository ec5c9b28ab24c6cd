"""Local training: every client of a group takes its steps of SGD, all of them in one computation."""

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit
from anabranch.federated.packed import epoch

# Clients share a computation while their rows, gradients and momentum stay in a core's cache, and only where a client's
# own products are too small to fill a core: beyond, one after another is faster (measured, benchmarks/results).
CACHED_NUMBERS = 400_000
FLOPS_ALONE = 8e6  # of a client's step, forward and backward


def group_size(size: int, flops: float) -> int:
    """Clients to train together, of rows of `size` numbers and steps of so many floating-point operations."""
    return 1 if flops > FLOPS_ALONE else max(1, CACHED_NUMBERS // size)


def train(method: FedAvg, visit: Visit) -> Tensor:
    """What the clients of a visit make of the model: rows [W * N, D]. `visit.kept` is theirs afterwards, too."""
    schedule, trained = visit.schedule, visit.network.layout.trained
    rows = visit.received.clone()
    velocity = torch.zeros(len(rows), trained)
    copies = len(rows) // len(visit.clients)
    method.begin(visit, rows)
    for number in range(schedule.epochs):
        method.begin_epoch(visit, rows, number)
        for batch in epoch(visit.data, visit.streams, number, size=schedule.batch, drop_last=schedule.drop_last):
            leaf = rows.detach().requires_grad_()
            (slope,) = torch.autograd.grad(method.loss(visit, leaf, batch).sum(), leaf)
            step(rows, slope, velocity, visit, batch.live.repeat(copies))
        method.end_epoch(visit, rows, number)
    return method.end(visit, rows)


def step(rows: Tensor, slope: Tensor, velocity: Tensor, visit: Visit, live: Tensor) -> None:
    """One step of SGD in place: velocity = momentum * velocity + slope + weight_decay * rows, rows -= lr * velocity.

    Rows that are not live [W * N] bool stay as they are.
    """
    schedule, trained = visit.schedule, visit.network.layout.trained
    slope, weights = slope[:, :trained], rows[:, :trained]
    if not bool(live.all()):
        stopped, before = ~live, (velocity[~live], rows[~live])
    velocity.mul_(schedule.momentum).add_(slope)
    if schedule.weight_decay:
        velocity.add_(weights, alpha=schedule.weight_decay)
    weights.sub_(velocity, alpha=schedule.lr)
    if visit.statistics is not None:
        rows[:, trained:] = visit.statistics.detach()
    if not bool(live.all()):
        velocity[stopped], rows[stopped] = before
