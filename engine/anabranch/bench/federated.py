"""Federated rounds beside plain torch, torch.func and Flower: the same clients, batches and first weights, in turns.

A round of ours counts everything: who takes part, every client's order, gathering samples, training, the mean. Before
anything is timed, the models that come out are compared.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.bench.federated_loop import Loop, Processes, Work, orders, vmapped_round, with_threads
from anabranch.bench.machine import Machine
from anabranch.bench.timing import interleave, timed
from anabranch.data.labelled import Labelled
from anabranch.data.sources import load, parse_source, read_digits
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.layout import Network
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.partition import deal_out, parse_partition
from anabranch.federated.rounds import Federation, Holdings, found, run_round
from anabranch.federated.schedule import Schedule

APART = 1e-5  # largest distance between two contenders' weights
PICTURES, SIDE = 60_000, 28  # of Fashion-MNIST


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one contender took.

    clients  trained in each call
    passes   forward and backward passes of a sample, as many times as FedAvg's; 0 where they are not counted
    peak     bytes of the process at most, 0 where they are not measured
    digest   SHA-256 of the model, where that is compared
    """

    case: str
    contender: str
    seconds: tuple[float, ...] = ()
    clients: int = 0
    passes: float = 0.0
    peak: int = 0
    digest: str = ""

    @property
    def median_s(self) -> float:
        return median(self.seconds) if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedReport:
    """A table for `report.to_text` and its like; times are compared with the first contender of the same case."""

    machine: Machine
    measured: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return "Federated rounds"

    @property
    def header(self) -> tuple[str, ...]:
        return (
            "case", "contender", "ms", "least … most", "clients/s", "time / first", "passes", "a pass / first's",
            "peak, MB", "SHA-256",
        )  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """One line each."""
        first: dict[str, Row] = {}
        for row in self.measured:
            if row.seconds:
                first.setdefault(row.case, row)
        return [_cells(row, first.get(row.case, row)) for row in self.measured]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            "tasks: D digits, perceptron 64-64-10, 10 steps of 16 · F pictures of 28 x 28, perceptron 784-128-10, 18 "
            "steps of 32 · C the same pictures, two convolutions, 6 steps of 32; SGD with momentum and weight decay",
            f"all models of a case are within {APART:g} of each other; peers are given the orders of the samples",
            *self.remarks,
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {"title": self.title, **asdict(self)}


def _cells(row: Row, first: Row) -> tuple[str, ...]:
    ms = [f"{1e3 * f(row.seconds):.1f}" if row.seconds else "" for f in (median, min, max)] if row.seconds else []
    ratio = row.median_s / first.median_s if row.seconds else 0.0
    return (
        row.case,
        row.contender,
        ms[0] if ms else "",
        f"{ms[1]} … {ms[2]}" if ms else "",
        f"{row.clients / row.median_s:.0f}" if ms else "",
        f"{ratio:.2f}" if ms else "",
        f"{row.passes:.2f}" if row.passes else "",
        f"{ratio / row.passes:.2f}" if row.passes else "",
        f"{row.peak / 1e6:.0f}" if row.peak else "",
        row.digest[:16],
    )


class Task(NamedTuple):
    """A federation before its first round, and the same as its peers get it."""

    name: str
    federation: Federation
    work: Work


def digits_task(clients: int, *, n: int = 160) -> Task:
    """D: samples of each client are drawn from the digits."""
    data = read_digits()
    widths = (prod(data.x.shape[1:]), 64, data.classes)
    owned = _dealt(f"resample:{n}", data.y, clients)
    return _task(f"D, {clients} clients", MLP(widths), widths, data, owned, Schedule(epochs=1, batch=16))


def pictures_task(data: Labelled, clients: int, *, convolutions: bool, n: int) -> Task:
    """F, or C with convolutions: n samples of each client, of which no other has any."""
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(0))
    owned = order[: clients * n].view(clients, n).unbind()
    channels, height, width = data.x.shape[1:]
    widths = () if convolutions else (channels * height * width, 128, data.classes)
    network: Network = CNN(channels, height, width, data.classes) if convolutions else MLP(widths)
    return _task(
        f"{'C' if convolutions else 'F'}, {clients} clients", network, widths, data, owned, Schedule(epochs=1, batch=32)
    )


def pictures(source: str | None, *, most: int = PICTURES) -> Labelled:
    """The data that are named, or as many random pictures of Fashion-MNIST's size."""
    if source is not None:
        return load(parse_source(source))
    random = torch.Generator().manual_seed(0)
    x = torch.rand(most, 1, SIDE, SIDE, generator=random)
    y = torch.randint(0, 10, (most,), generator=random)
    names = [str(c) for c in range(10)]
    return Labelled(name="random pictures", kind="image", x=x, y=y, test_x=x[:1], test_y=y[:1], names=names)


def _dealt(partition: str, y: Tensor, clients: int) -> Sequence[Tensor]:
    return deal_out(parse_partition(partition), y, clients, torch.Generator().manual_seed(0))


def _task(
    name: str,
    network: Network,
    widths: tuple[int, ...],
    data: Labelled,
    owned: Sequence[Tensor],
    schedule: Schedule,
) -> Task:
    federation = found(FedAvg(), network, Holdings(data.x, data.y, owned), schedule)
    index, start = orders(owned, schedule, 0), federation.server["model"][0]
    work = Work(widths=widths, x=data.x, y=data.y, index=index, start=start, schedule=schedule)
    return Task(name, federation, work)


def our_round(federation: Federation, threads: int) -> Tensor:
    """[D]: the model after one more round; the federation stays as it is."""
    after = replace(federation, server=dict(federation.server), kept=dict(federation.kept))
    run_round(after, threads=threads)
    return after.server["model"][0]


def throughput(task: Task, *, threads: int, repeats: int) -> list[Row]:
    """Rounds of ours, of the loop in plain torch and of vmap(grad), each with one thread and with `threads`."""
    loop = Loop(task.work)
    processes = Processes(task.work, threads) if threads > 1 else None
    contenders: list[tuple[str, Callable[[], Tensor]]] = []
    for count in dict.fromkeys((threads, 1)):
        contenders.append((f"anabranch, {_threads(count)}", partial(our_round, task.federation, count)))
    for name, step in (("torch loop", loop.round), ("torch vmap", partial(vmapped_round, task.work))):
        contenders += [(f"{name}, {_threads(count)}", with_threads(step, count)) for count in sorted({1, threads})]
    if processes:
        contenders.insert(-2, (f"torch loop, {threads} processes", processes.round))
    try:
        check_agreement(task.name, contenders)
        times = interleave([timed(step) for _, step in contenders], repeats=repeats, warmup=0)  # the comparison was one
    finally:
        if processes:
            processes.close()
    clients = len(task.work.index)
    return [
        Row(case=task.name, contender=name, seconds=tuple(seconds), clients=clients)
        for (name, _), seconds in zip(contenders, times, strict=True)
    ]


def check_agreement(case: str, contenders: Sequence[tuple[str, Callable[[], Tensor]]]) -> None:
    """ValueError names a contender whose weights are not the first one's."""
    (first, step), *others = contenders
    expected = step()
    for name, step in others:
        distance = float((step() - expected).abs().max())
        if not distance <= APART:  # NaN must fail too
            raise ValueError(f"{case}: weights of {name} are {distance:.1e} from those of {first}")


def digests(*, clients: int, rounds: int, threads: Sequence[int]) -> list[Row]:
    """SHA-256 of the model after some rounds of task D, for each number of threads."""
    rows = []
    for count in threads:
        federation = digits_task(clients).federation
        for _ in range(rounds):
            run_round(federation, threads=count)
        case = f"D, {clients} clients, model after {rounds} rounds"
        rows.append(Row(case=case, contender=f"anabranch, {_threads(count)}", digest=digest(federation)))
    return rows


def digest(federation: Federation) -> str:
    """SHA-256 of the model's bytes."""
    return hashlib.sha256(federation.server["model"].contiguous().numpy().data).hexdigest()


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
