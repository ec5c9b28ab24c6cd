"""The peers of `anabranch bench federated` in plain torch: one client after another, and all of them by torch.func.

They get each client's order of samples ready-made, so that their batches are ours; ours draws it in its own time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.sgd import sgd

from anabranch.common.memory import keep_freed_memory
from anabranch.common.threads import torch_threads
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams

VMAPPED = 100  # clients in one computation; a thousand are slower (measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the clients of one round do; one epoch each.

    widths   of a perceptron, or none: then it is the small convolutional network of pictures [channels, height, width]
    x, y     [M, ...], [M] samples of all
    index    [K, n] int64  which of these each client sees, in its order, whole batches
    start    [D] the row of the model that is sent
    """

    widths: tuple[int, ...]
    x: Tensor
    y: Tensor
    index: Tensor
    start: Tensor
    schedule: Schedule

    def module(self) -> nn.Module:
        """The network in torch's own layers."""
        layers: list[nn.Module] = []
        if self.widths:
            for inputs, outputs in pairwise(self.widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            return nn.Sequential(nn.Flatten(), *layers[:-1])
        channels, height, width = self.x.shape[1:]
        for inputs, outputs in ((channels, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        area = height // 4 * (width // 4)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * area, 128), nn.ReLU(), nn.Linear(128, 10))


def orders(owned: Sequence[Tensor], schedule: Schedule, round: int) -> Tensor:
    """[K, n]: the samples of each client in the order in which ours sees them, only whole batches; all as many."""
    counts = torch.tensor([len(one) for one in owned])
    n = int(counts.max())
    order = Streams(schedule.seed, torch.arange(len(owned)), round).order(counts, n, 0)
    return torch.stack(list(owned)).gather(1, order)[:, : n - n % schedule.batch]


def parameters_of(row: Tensor, module: nn.Module) -> list[Tensor]:
    """A row [D] in the shapes of the module's parameters; linear layers keep [outputs, inputs] in torch."""
    shaped, at = [], 0
    for p in module.parameters():
        part = row[at : at + p.numel()]
        shaped.append(part.view(p.shape[::-1]).T.contiguous() if p.ndim == 2 else part.view(p.shape).clone())
        at += p.numel()
    return shaped


def row_of(parameters: Sequence[Tensor]) -> Tensor:
    """The other way round."""
    return torch.cat([(p.T if p.ndim == 2 else p).flatten() for p in parameters]).detach()


class Loop:
    """One client after another: nn.Module, autograd, torch.optim.SGD; the sum of the models is kept as they come."""

    def __init__(self, work: Work) -> None:
        self.work, self.module, s = work, work.module(), work.schedule
        self.parameters: list[Tensor] = list(self.module.parameters())
        self.optimiser = torch.optim.SGD(
            self.parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True
        )

    @torch.no_grad()
    def begin(self, start: Sequence[Tensor]) -> None:
        """Parameters as they are sent, no momentum yet."""
        torch._foreach_copy_(self.parameters, list(start))
        self.optimiser.state.clear()

    def train(self, start: Sequence[Tensor], index: Tensor) -> None:
        """One client's epoch over samples [n]."""
        self.begin(start)
        batch = self.work.schedule.batch
        x, y = self.work.x.index_select(0, index), self.work.y.index_select(0, index)
        for some_x, some_y in zip(x.split(batch), y.split(batch), strict=True):
            self.optimiser.zero_grad()
            F.cross_entropy(self.module(some_x), some_y).backward()
            self.optimiser.step()

    def total(self, row: Tensor, clients: range) -> Tensor:
        """[D]: the sum of some clients' models."""
        start = parameters_of(row, self.module)
        total = [torch.zeros_like(p) for p in start]
        for k in clients:
            self.train(start, self.work.index[k])
            with torch.no_grad():
                torch._foreach_add_(total, self.parameters)
        return row_of(total)

    def round(self) -> Tensor:
        """[D]: the mean of all models."""
        K = len(self.work.index)
        return self.total(self.work.start, range(K)) / K


def vmapped_round(work: Work) -> Tensor:
    """[D]: the mean of all models, clients trained together by vmap(grad)."""
    module, s, K = work.module(), work.schedule, len(work.index)
    names = [name for name, _ in module.named_parameters()]
    start = parameters_of(work.start, module)

    def loss(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, dict(zip(names, parameters, strict=True)), x)
        return F.cross_entropy(logits, y)

    slopes_of = vmap(grad(loss))
    total = [torch.zeros_like(p) for p in start]
    for some in work.index.split(VMAPPED):
        rows = [p.expand(len(some), *p.shape).clone() for p in start]
        velocity: list[Tensor | None] = [torch.zeros_like(p) for p in rows]
        x = work.x.index_select(0, some.flatten()).unflatten(0, some.shape)
        y = work.y.index_select(0, some.flatten()).view(some.shape)
        for some_x, some_y in zip(x.split(s.batch, 1), y.split(s.batch, 1), strict=True):
            slopes = list(slopes_of(rows, some_x, some_y))
            sgd(
                rows, slopes, velocity, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, dampening=0.0,
                nesterov=False, maximize=False, fused=True,
            )  # fmt: skip
        torch._foreach_add_(total, [p.sum(0) for p in rows])
    return row_of(total) / K


class Processes:
    """The loop in processes of one thread each, that hold the data already and share the clients evenly."""

    def __init__(self, work: Work, count: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        for tensor in (work.x, work.y, work.index):
            tensor.share_memory_()
        self.work = work
        self.pools = [ProcessPoolExecutor(1, context, _start, (work,)) for _ in range(count)]

    def round(self) -> Tensor:
        """[D]: the mean of all models."""
        K, share = len(self.work.index), -(-len(self.work.index) // len(self.pools))
        parts = [range(i, min(i + share, K)) for i in range(0, K, share)]
        waiting = [pool.submit(_total, self.work.start, part) for pool, part in zip(self.pools, parts, strict=False)]
        return torch.stack([one.result() for one in waiting]).sum(0) / K

    def close(self) -> None:
        """End the processes."""
        for pool in self.pools:
            pool.shutdown()


_held: list[Loop] = []  # in a process of `Processes`


def _start(work: Work) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    _held.append(Loop(work))


def _total(row: Tensor, clients: range) -> Tensor:
    return _held[0].total(row, clients)


def with_threads(step: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    """The same step, computed by `count` of torch's threads."""
    return torch_threads(count)(step)
