"""A federation on one machine: cohort -> local training -> aggregate -> evaluate, round after round.

A run is a function of its method, network, data and schedule: what is random depends on (seed, client, round) alone,
groups of clients are formed by their numbers, and sums are taken in that order, in float64. So neither the number of
threads nor a restart changes a bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from anabranch.common.threads import torch_threads
from anabranch.federated.gathering import Gathering, first_server, in_order, kept_by_each, open_visit, pay
from anabranch.federated.local import group_size
from anabranch.federated.method import FedAvg, Replies, Tensors, Visit
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import pack
from anabranch.federated.robust_mean import conclude
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import NOBODY, Streams

if TYPE_CHECKING:
    from anabranch.federated.private import SecureSums

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
    sums    by which the mean is taken, in the plain one's place
    """

    method: FedAvg
    network: Network
    holdings: Holdings
    schedule: Schedule
    server: Tensors
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    round: int = 0
    sums: "SecureSums | None" = None


def found(method: FedAvg, network: Network, holdings: Holdings, schedule: Schedule) -> Federation:
    """A federation before its first round; its networks differ in their first weights."""
    network = method.network(network)
    if not holdings.owned or min(map(len, holdings.owned)) < 1:
        raise ValueError("every client needs at least one sample")
    server = first_server(method, network, len(holdings.owned), schedule.seed)
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
    f.server = conclude(f.method, f.server, replies, f.round)
    f.round += 1
    return replies


def survey(federation: Federation, *, threads: int) -> Tensors:
    """The answers [K, ...] of all clients to the method's question."""
    f = federation
    everyone = torch.arange(len(f.holdings.owned))
    answers = each(lambda visit: f.method.answer(visit), _visits(f, everyone), threads)
    return in_order([(visit.clients, answer) for visit, answer in answers])


def visit_all(federation: Federation, clients: Tensor, *, threads: int) -> Replies:
    """Train some clients [m] and gather what they send."""
    f = federation
    counts = torch.tensor([f.holdings.owned[k].numel() for k in clients.tolist()])
    whole = f.sums is not None
    gathering = Gathering(f.method, f.network, f.server["model"], clients, counts, whole=whole)
    for visit, (rows, extra) in each(partial(pay, f.method), _visits(f, clients), threads):
        gathering.take(visit.clients, rows, extra)
        if visit.kept:
            f.kept.update(zip(visit.clients.tolist(), kept_by_each(f.method, visit), strict=True))
    replies = gathering.replies()
    return replies if f.sums is None else f.sums.carry(f.server["model"], replies)


def each(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """Results in the order of the items. Each is computed by one thread alone; few of them are there at a time.

    What the caller does with a result is done by one thread, too: more would spin for work where others compute.
    """
    if threads == 1:
        with torch_threads(1):
            yield from ((item, function(item)) for item in items)
        return
    with torch_threads(1), ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting = []
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                first, future = waiting.pop(0)
                yield first, future.result()
        for item, future in waiting:
            yield item, future.result()


def groups(method: FedAvg, network: Network, schedule: Schedule, counts: Mapping[int, int]) -> Iterator[list[int]]:
    """Clients to train together, of about as many samples; `counts` are theirs."""
    W = method.networks
    flops = BACKWARD * W * network.flops * schedule.batch
    by_count = sorted(counts, key=lambda k: (counts[k], k))
    size = 1 if network.batch_statistics else group_size(len(counts), W * network.layout.size, flops)
    for begin in range(0, len(by_count), size):
        yield sorted(by_count[begin : begin + size])


def _visits(federation: Federation, clients: Tensor) -> Iterator[Visit]:
    """Groups of clients, ready to be trained."""
    f, owned = federation, federation.holdings.owned
    for group in groups(f.method, f.network, f.schedule, {k: owned[k].numel() for k in clients.tolist()}):
        numbers = torch.tensor(group)
        yield open_visit(
            f.method, f.network, f.schedule, round=f.round, clients=numbers,
            data=pack(f.holdings.x, f.holdings.y, [owned[k] for k in group]),
            received=f.server["model"].repeat_interleave(len(group), 0),
            sent=f.method.send(f.server, numbers, f.round), kept=[f.kept.get(k, {}) for k in group],
        )  # fmt: skip
