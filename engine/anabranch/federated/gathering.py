"""What passes between a server and its clients, wherever they are: a visit is opened, and what it sends is gathered."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.local import train
from anabranch.federated.method import FedAvg, Replies, Tensors, Visit
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import Packed
from anabranch.federated.robust_mean import check_mean
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams


def first_server(method: FedAvg, network: Network, clients: int, seed: int) -> dict[str, Tensor]:
    """What the server knows before the first round, "model" [W, D] too; networks differ in their first weights."""
    check_mean(method)
    generator = torch.Generator().manual_seed(seed)
    model = torch.stack([network.first(generator) for _ in range(method.networks)])
    return {"model": model, **method.first(network, clients)}


def open_visit(
    method: FedAvg,
    network: Network,
    schedule: Schedule,
    *,
    round: int,
    clients: Tensor,
    data: Packed,
    received: Tensor,
    sent: Tensors,
    kept: Sequence[Tensors],
) -> Visit:
    """A visit of N clients; `kept` [N] is what each has kept, nothing before its first visit."""
    own = method.fresh(network, data)
    for i, of_client in enumerate(kept):
        for name, value in of_client.items():
            if name in method.per_sample:  # entries of samples are filled up with what `fresh` has
                own[name][i, : len(value)] = value
            else:
                own[name][i] = value
    return Visit(
        network=network, schedule=schedule, round=round, clients=clients, data=data, received=received, sent=sent,
        kept=own, streams=Streams(schedule.seed, clients, round),
    )  # fmt: skip


def pay(method: FedAvg, visit: Visit) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole visit: rows [W * N, D] that the clients send, and what else they do."""
    rows = train(method, visit)
    return rows, method.reply(visit, rows)


def kept_by_each(method: FedAvg, visit: Visit) -> list[dict[str, Tensor]]:
    """What each of the N clients keeps after a visit."""
    return [
        {
            name: (value[i, :count] if name in method.per_sample else value[i]).clone()
            for name, value in visit.kept.items()
        }
        for i, count in enumerate(visit.data.counts.tolist())
    ]


class Gathering:
    """The replies to a model [W, D] of clients [m], in the order in which groups of them come.

    counts  [m] int64      samples of each
    whole   keep all models, which methods do that need them all

    Sums are taken in that order, in float64.
    """

    def __init__(
        self, method: FedAvg, network: Network, model: Tensor, clients: Tensor, counts: Tensor, *, whole: bool = False
    ) -> None:
        self._method, self._trained = method, network.layout.trained
        self._model, self._clients, self._counts = model, clients, counts
        self._total = torch.zeros(model.shape, dtype=torch.float64)
        self._models = (
            torch.empty(len(clients), *model.shape) if method.needs_all or method.mean is not None or whole else None
        )
        self._lengths = torch.empty(len(clients), len(model), dtype=torch.float64)
        self._extras: list[tuple[Tensor, Tensors]] = []

    def take(self, clients: Tensor, rows: Tensor, extra: Tensors) -> None:
        """Of some of the clients [N]: rows [W * N, D] and what `reply` gave."""
        W = len(self._model)
        sent = rows.view(W, -1, rows.shape[1])
        place = torch.searchsorted(self._clients, clients)
        for w in range(W):  # one network at a time: float64 copies stay small
            apart = sent[w].double().sub_(self._model[w])
            self._total[w] += self._counts[place].double() @ apart
            self._lengths[place, w] = torch.linalg.vector_norm(apart[:, : self._trained], dim=1).square()
        if self._models is not None:
            self._models[place] = sent.transpose(0, 1)
        self._extras.append((clients, extra))

    def replies(self) -> Replies:
        """When all have come."""
        mean = (self._model.double() + self._total / self._counts.sum()).float()
        extra = in_order(self._extras, self._method.uneven)
        return Replies(self._clients, self._counts, self._models, mean, self._lengths, extra)


def in_order(parts: Sequence[tuple[Tensor, Tensors]], uneven: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Entries of groups of clients as one tensor each, in the order of their numbers.

    Those that are uneven, [N, things, ...], are filled up with zeros to the most things of any client.
    """
    order = torch.cat([numbers for numbers, _ in parts]).argsort()
    whole = {}
    for name in parts[0][1]:
        values = [entries[name] for _, entries in parts]
        if name in uneven:
            most = max(value.shape[1] for value in values)
            values = [F.pad(value, (0, 0) * (value.ndim - 2) + (0, most - value.shape[1])) for value in values]
        whole[name] = torch.cat(values)[order]
    return whole
