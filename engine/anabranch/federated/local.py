"""Local training: every client of a group takes its steps of SGD, all of them in one computation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from anabranch.federated.augment import augment
from anabranch.federated.decorrelation import correlation
from anabranch.federated.method import FedAvg, Visit, changes
from anabranch.federated.networks.layout import Output
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import Batch, Packed, epoch, shuffled
from anabranch_kernels.perceptron_sgd.op import MOST_LAYERS, perceptron_sgd
from anabranch_kernels.perceptron_sgd.steps import PerceptronSteps

# Clients share a computation, so that its many small operations are called once for all of them, while their rows,
# gradients and momentum stay in a cache, and only where a client's own products do not take far longer than the calls:
# beyond, one after another is as fast (measured, benchmarks/results).
CACHED_NUMBERS = 1_600_000
FLOPS_ALONE = 2e8  # of a client's step, forward and backward
MANY = 64  # clients who make two groups, for two threads, in no more time than one group takes on one


def group_size(clients: int, size: int, flops: float) -> int:
    """How many of so many clients to train together, of rows of `size` numbers and steps of `flops` operations.

    Groups are about as large, and an even number of them, so that two threads end together.
    """
    most = 1 if flops > FLOPS_ALONE else max(1, CACHED_NUMBERS // size)
    groups = max(-(-clients // most), 2 if clients >= MANY else 1)
    return -(-clients // (groups + groups % 2)) if groups > 1 else max(1, clients)


def train(method: FedAvg, visit: Visit) -> Tensor:
    """What the clients of a visit make of the model: rows [W * N, D]. `visit.kept` is theirs afterwards, too."""
    rows = visit.received.clone()
    velocity = torch.zeros_like(rows)
    take = way_of(method, visit)
    method.begin(visit, rows)
    for number in range(visit.schedule.epochs):
        method.begin_epoch(visit, rows, number)
        take(method, visit, rows, velocity, method.samples(visit), number)
        method.end_epoch(visit, rows, number)
    return method.end(visit, rows)


def way_of(method: FedAvg, visit: Visit) -> Callable[[FedAvg, Visit, Tensor, Tensor, Packed, int], None]:
    """How epochs are taken: the more of a step is a perceptron's and plain cross-entropy's, the more a kernel does."""
    schedule, network = visit.schedule, visit.network
    if type(network) is not MLP or len(network.widths) > MOST_LAYERS + 1 or changes(method, "loss", "slope"):
        return by_autograd
    if not changes(method, "loss_of") and not schedule.decorrelation and not schedule.augment:
        return whole
    return by_kernel if len(network.widths) <= 3 else by_autograd  # latents are the features


def whole(method: FedAvg, visit: Visit, rows: Tensor, velocity: Tensor, data: Packed, number: int) -> None:
    """The epoch in a kernel that keeps each client's row in its cache."""
    schedule, network = visit.schedule, visit.network
    assert isinstance(network, MLP)
    order, counts = shuffled(data, visit.streams, number, size=schedule.batch, drop_last=schedule.drop_last)
    index, y = data.owned.gather(1, order), data.y.gather(1, order)
    for own, moving in zip(rows.split(len(y)), velocity.split(len(y)), strict=True):  # network after network
        perceptron_sgd(
            own, moving, data.source.flatten(1), index, y, counts, widths=network.widths, batch=schedule.batch,
            lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        )  # fmt: skip


def by_kernel(method: FedAvg, visit: Visit, rows: Tensor, velocity: Tensor, data: Packed, number: int) -> None:
    """Each step in a kernel but for the loss; `rows` and `velocity` are up to date when the epoch ends."""
    schedule, network = visit.schedule, visit.network
    assert isinstance(network, MLP)
    steps = PerceptronSteps(rows, velocity, widths=network.widths, batch=schedule.batch)
    for batch in batches(visit, data, number):
        logits, features = (said.requires_grad_() for said in steps.forward(batch.x.flatten(2)))
        out = Output(logits, features, features)
        loss = method.loss_of(visit, out, batch)
        visit.latest = rows, batch.x, out  # rows are not what they will be; nothing may look through them again
        loss = descended(visit, rows, batch, loss)
        of_logits, of_features = torch.autograd.grad(loss, [logits, features], torch.ones_like(loss), allow_unused=True)
        steps.step(
            torch.zeros_like(logits) if of_logits is None else of_logits, of_features, batch.live, lr=schedule.lr,
            momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        )  # fmt: skip
    steps.finish()


def by_autograd(method: FedAvg, visit: Visit, rows: Tensor, velocity: Tensor, data: Packed, number: int) -> None:
    """Each step by torch alone: any network, any loss."""
    for batch in batches(visit, data, number):
        slopes = method.slope(visit, rows, slope_of(method, visit, rows, batch))
        step(rows, velocity, slopes, visit, batch)


def batches(visit: Visit, data: Packed, number: int) -> Iterator[Batch]:
    """Those of an epoch, as they are shown."""
    schedule = visit.schedule
    for batch in epoch(data, visit.streams, number, size=schedule.batch, drop_last=schedule.drop_last):
        yield batch._replace(x=augment(batch.x, visit.streams, batch.number)) if schedule.augment else batch


def slope_of(method: FedAvg, visit: Visit, rows: Tensor, batch: Batch) -> list[Tensor]:
    """Of the loss in rows [W * N, D]: one tensor for all of them, or of a single row one for each trained tensor.

    A single row's tensors are leaves of their own, so that their slopes need not be copied into one.
    """
    leaf = rows.detach().requires_grad_()
    if len(rows) > 1:
        loss = descended(visit, leaf, batch, method.loss(visit, leaf, batch))
        (slope,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        return [slope[:, : visit.network.layout.trained]]
    layout = visit.network.layout
    views = {name: view.detach().requires_grad_() for name, view in layout.views(rows).items()}
    visit.leaves = leaf, views
    loss = descended(visit, leaf, batch, method.loss(visit, leaf, batch))
    trained = list(views.values())[: layout.tensors_trained]
    whole, *slopes = torch.autograd.grad(loss, [leaf, *trained], torch.ones_like(loss), allow_unused=True)
    visit.leaves = None
    if whole is None:
        return [torch.zeros_like(view) if slope is None else slope for view, slope in zip(trained, slopes, strict=True)]
    # What a method makes of the row itself, such as its distance from another, comes beside.
    added = list(layout.views(whole).values())
    return [more if slope is None else slope + more for slope, more in zip(slopes, added, strict=False)]


def descended(visit: Visit, rows: Tensor, batch: Batch, loss: Tensor) -> Tensor:
    """[W * N]: a method's loss of each row, and what the schedule adds to any."""
    if not visit.schedule.decorrelation:
        return loss
    features = visit.features(rows, batch.x)
    return loss + visit.schedule.decorrelation * correlation(features, batch.real)


def step(rows: Tensor, velocity: Tensor, slopes: list[Tensor], visit: Visit, batch: Batch) -> None:
    """One step of SGD in place: velocity = momentum * velocity + slope + weight_decay * rows, rows -= lr * velocity.

    Clients whose batch is not live keep their rows and velocities as they are.
    """
    schedule, layout = visit.schedule, visit.network.layout
    trained = layout.trained
    all_live = bool(batch.live.all())
    if not all_live:
        stopped = ~batch.live.repeat(len(rows) // len(batch.live))
        before = rows[stopped], velocity[stopped]
    weights = layout.cut(rows, len(slopes))
    # torch's fused step takes them as they lie in memory; those of convolutions may lie with their channels last
    slopes = [s if s.stride() == w.stride() else s.contiguous() for s, w in zip(slopes, weights, strict=True)]
    moments: list[Tensor | None] = [*layout.cut(velocity, len(slopes))]  # as torch declares them
    sgd(
        weights, slopes, moments, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        dampening=0.0, nesterov=False, maximize=False, fused=True,
    )  # fmt: skip
    if visit.statistics is not None:
        rows[:, trained:] = visit.statistics.detach()
    if not all_live:
        rows[stopped], velocity[stopped] = before
