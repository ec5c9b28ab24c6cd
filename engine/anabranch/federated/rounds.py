"""A federation on one machine: cohort -> local training -> aggregate -> evaluate, round after round.

A run is a function of its method, network, data and schedule: what is random depends on (seed, client, round) alone,
groups of clients are formed by their numbers, and sums are taken in that order, in float64. So neither the number of
threads nor a restart changes a bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.local import group_size, train
from anabranch.federated.method import FedAvg, Replies, Tensors, Visit
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import Packed, pack
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import NOBODY, Streams

T = TypeVar("T")
R = TypeVar("R")
BACKWARD = 3  # a pass there and back costs about three passes there


class Holdings(NamedTuple):
    """The samples of a federation and who owns them.

    x, y   [M, ...], [M] int64   y are the labels that clients learn from
    owned  [K] of [n_k] int64    which are whose
    """

    x: Tensor
    y: Tensor
    owned: Sequence[Tensor]


@dataclass(slots=True, kw_only=True)
class Federation:
    """A federation between two rounds.

    server  "model" [W, D] and what the method's server knows beside it
    kept    what clients keep, for those that have been visited
    round   the next
    """

    method: FedAvg
    network: Network
    holdings: Holdings
    schedule: Schedule
    server: Tensors
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    round: int = 0


def found(method: FedAvg, network: Network, holdings: Holdings, schedule: Schedule) -> Federation:
    """A federation before its first round; its networks differ in their first weights."""
    network = method.network(network)
    if not holdings.owned or min(map(len, holdings.owned)) < 1:
        raise ValueError("every client needs at least one sample")
    generator = torch.Generator().manual_seed(schedule.seed)
    model = torch.stack([network.first(generator) for _ in range(method.networks)])
    server = {"model": model, **method.first(network, len(holdings.owned))}
    return Federation(method=method, network=network, holdings=holdings, schedule=schedule, server=server)


def cohort(schedule: Schedule, clients: int, round: int) -> Tensor:
    """Numbers [m] of the clients of a round, rising."""
    everyone = torch.tensor([clients])
    order = Streams(schedule.seed, torch.tensor([NOBODY]), round).order(everyone, clients, 0)[0]
    return order[: schedule.cohort_size(clients)].sort().values


def run_round(federation: Federation, *, threads: int = 1) -> Replies:
    """Ask the clients if the method wants to, train a cohort and aggregate; the federation is one round older."""
    f = federation
    if f.method.survey(f.round):
        f.server = f.method.settle(f.server, survey(f, threads=threads), f.round)
    replies = visit_all(f, cohort(f.schedule, len(f.holdings.owned), f.round), threads=threads)
    f.server = f.method.aggregate(f.server, replies, f.round)
    f.round += 1
    return replies


def survey(federation: Federation, *, threads: int) -> Tensors:
    """The answers [K, ...] of all clients to the method's question."""
    f = federation
    everyone = torch.arange(len(f.holdings.owned))
    answers = each(lambda visit: f.method.answer(visit), _visits(f, everyone), threads)
    return _in_order(everyone, [(visit.clients, answer) for visit, answer in answers])


def visit_all(federation: Federation, clients: Tensor, *, threads: int) -> Replies:
    """Train some clients [m] and gather what they send."""
    f = federation
    W, m = f.method.networks, len(clients)
    counts = torch.tensor([len(f.holdings.owned[k]) for k in clients.tolist()])
    total = torch.zeros(f.server["model"].shape, dtype=torch.float64)
    models = torch.empty(m, *total.shape) if f.method.needs_all else None
    lengths = torch.empty(m, W, dtype=torch.float64)
    extras = []
    for visit, (rows, extra) in each(partial(_train, f.method), _visits(f, clients), threads):
        sent = rows.view(W, -1, rows.shape[1])
        place = torch.searchsorted(clients, visit.clients)
        for w in range(W):  # one network at a time: float64 copies stay small
            apart = sent[w].double() - f.server["model"][w].double()
            total[w] += visit.data.counts.double() @ apart
            lengths[place, w] = apart[:, : f.network.layout.trained].square().sum(1)
        if models is not None:
            models[place] = sent.transpose(0, 1)
        extras.append((visit.clients, extra))
        _keep(f, visit)
    mean = (f.server["model"].double() + total / counts.sum()).float()
    return Replies(clients, counts, models, mean, lengths, _in_order(clients, extras))


def _train(method: FedAvg, visit: Visit) -> tuple[Tensor, dict[str, Tensor]]:
    rows = train(method, visit)
    return rows, method.reply(visit, rows)


def each(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """Results in the order of the items. Each is computed by one thread alone; few of them are there at a time."""
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting = []
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                first, future = waiting.pop(0)
                yield first, future.result()
        for item, future in waiting:
            yield item, future.result()


def _visits(federation: Federation, clients: Tensor) -> Iterator[Visit]:
    """Groups of clients of about as many samples, ready to be trained."""
    f, W = federation, federation.method.networks
    owned = f.holdings.owned
    flops = BACKWARD * W * f.network.flops * f.schedule.batch
    by_count = sorted(clients.tolist(), key=lambda k: (len(owned[k]), k))
    size = 1 if f.network.batch_statistics else group_size(W * f.network.layout.size, flops)
    for begin in range(0, len(by_count), size):
        group = sorted(by_count[begin : begin + size])
        numbers = torch.tensor(group)
        data = pack(f.holdings.x, f.holdings.y, [owned[k] for k in group])
        yield Visit(
            network=f.network, schedule=f.schedule, round=f.round, clients=numbers, data=data,
            received=f.server["model"].repeat_interleave(len(group), 0),
            sent=f.method.send(f.server, numbers, f.round), kept=_stack(f, group, data),
            streams=Streams(f.schedule.seed, numbers, f.round),
        )  # fmt: skip


def _stack(federation: Federation, group: Sequence[int], data: Packed) -> dict[str, Tensor]:
    """What the clients of a group keep, side by side; entries of samples are filled up with zeros."""
    f = federation
    kept = f.method.fresh(f.network, data)
    for i, k in enumerate(group):
        for name, value in f.kept.get(k, {}).items():
            if name in f.method.per_sample:
                kept[name][i, : len(value)] = value
            else:
                kept[name][i] = value
    return kept


def _keep(federation: Federation, visit: Visit) -> None:
    f = federation
    if not visit.kept:
        return
    for i, (k, count) in enumerate(zip(visit.clients.tolist(), visit.data.counts.tolist(), strict=True)):
        f.kept[k] = {
            name: (value[i, :count] if name in f.method.per_sample else value[i]).clone()
            for name, value in visit.kept.items()
        }


def _in_order(clients: Tensor, parts: Sequence[tuple[Tensor, Tensors]]) -> dict[str, Tensor]:
    """Entries of groups of clients as one tensor each, in the order of their numbers.

    Where groups have more or fewer things of a client ([N, things, ...]), all are filled up with zeros.
    """
    order = torch.cat([numbers for numbers, _ in parts]).argsort()
    return {name: _filled_up([entries[name] for _, entries in parts])[order] for name in parts[0][1]}


def _filled_up(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim > 1:
        most = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0) * (part.ndim - 2) + (0, most - part.shape[1])) for part in parts]
    return torch.cat(list(parts))
