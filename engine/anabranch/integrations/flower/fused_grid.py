"""`FusedGrid`: a grid for Flower's strategies whose nodes are trained together, in one computation on this machine.

    from flwr.serverapp.strategy import FedAvg
    from anabranch.integrations.flower.fused_grid import FusedGrid
    grid = FusedGrid(Clipping(), network, schedule, Holdings(x, y, owned), threads=2)
    FedAvg(fraction_evaluate=0.0, ...).start(grid=grid, initial_arrays=grid.initial_arrays(), num_rounds=30)

No SuperLink, no Ray, no ServerApp: `send_and_receive` trains all clients that a strategy sends messages to as
federated/rounds.py does, and answers as method_app.py's clients. What a strategy of Flower's does not know of (`send`,
`reply`, surveys) needs MethodStrategy. Nodes only train, so Flower's strategies need fraction_evaluate=0.0. What
clients keep is kept here: a grid is of one federation, or of MethodStrategies, which tell theirs apart.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from anabranch.federated.gathering import first_server, kept_by_each, open_visit, pay
from anabranch.federated.method import FedAvg, Visit
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import pack
from anabranch.federated.rounds import Holdings, each, groups
from anabranch.federated.schedule import Schedule
from anabranch.integrations.flower import method_records as records
from anabranch.integrations.flower.method_app import trained

try:
    from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ImportError("FusedGrid needs flwr>=1.40: pip install 'anabranch[flower]'") from error

FIRST_NODE = 2  # client k is node k + 2; node 1 is the server


class FusedGrid:
    """What strategies use of flwr.serverapp.Grid: `get_node_ids` and `send_and_receive`.

    Flower makes messages only in a run of its own, so where there is none the process becomes run 1.
    """

    def __init__(
        self, method: FedAvg, network: Network, schedule: Schedule, holdings: Holdings, *, threads: int = 1
    ) -> None:
        self.method, self.network, self.schedule = method, method.network(network), schedule
        self.holdings, self.threads = holdings, threads
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._federation = 0  # whose that is
        for name in ("task_id", "run_id", "node_id"):
            if getattr(TaskIdentity, f"_{name}") is None:
                setattr(TaskIdentity, name, 1)

    def initial_arrays(self) -> ArrayRecord:
        """The model that a run on one machine begins with."""
        server = first_server(self.method, self.network, len(self.holdings.owned), self.schedule.seed)
        return records.to_record(self.network.layout.named(server["model"]))

    def get_node_ids(self) -> list[int]:
        return [k + FIRST_NODE for k in range(len(self.holdings.owned))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies to the messages of a round, in the order of the clients; each client gets one at most.

        Messages that are neither a query nor training are answered by an error, as by a node without that function.
        """
        replies: list[Message] = []
        ours: dict[str, dict[int, Message]] = {"train": {}, f"query.{records.SURVEY}": {}}
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            k, kind = message.metadata.dst_node_id - FIRST_NODE, message.metadata.message_type
            if kind == f"query.{records.WHO}":
                content = RecordDict({records.CONFIG: ConfigRecord({records.CLIENT: k})})
                replies.append(Message(content=content, reply_to=message))
            elif kind not in ours:
                reason = f"a FusedGrid only trains, it has no {kind!r}"
                replies.append(Message(error=Error(code=0, reason=reason), reply_to=message))
            elif k in ours[kind]:
                raise ValueError(f"two messages {kind!r} to client {k} at once")
            else:
                ours[kind][k] = message
        for kind, of_clients in ours.items():
            replies += self._answered(of_clients) if kind != "train" else self._trained(of_clients)
        return replies

    def _answered(self, asked: dict[int, Message]) -> Iterable[Message]:
        for visit, answer in each(self.method.answer, self._visits(asked), self.threads):
            for i, k in enumerate(visit.clients.tolist()):
                content = RecordDict({records.EXTRA: records.of_client(answer, i)})
                yield Message(content=content, reply_to=asked[k])

    def _trained(self, asked: dict[int, Message]) -> Iterable[Message]:
        for visit, (rows, extra) in each(partial(pay, self.method), self._visits(asked), self.threads):
            self._kept |= zip(visit.clients.tolist(), kept_by_each(self.method, visit), strict=True)
            models = rows.unflatten(0, (self.method.networks, -1))
            for i, k in enumerate(visit.clients.tolist()):
                count = len(self.holdings.owned[k])
                content = trained(self.network, models[:, i], count, records.of_client(extra, i))
                yield Message(content=content, reply_to=asked[k])

    def _visits(self, asked: dict[int, Message]) -> Iterable[Visit]:
        owned, read = self.holdings.owned, {}
        for group in groups(self.method, self.network, self.schedule, {k: len(owned[k]) for k in asked}):
            contents = [asked[k].content for k in group]
            told, *others = {records.told_by(content) for content in contents}
            if others:
                raise ValueError(f"messages of several rounds at once: {sorted([told, *others])}")
            if told.federation != self._federation:
                self._federation, self._kept = told.federation, {}
            for record in (content[records.ARRAYS] for content in contents):  # most often one and the same
                if id(record) not in read:
                    read[id(record)] = records.read_model(record, self.network.layout, self.method.networks)
            models = torch.stack([read[id(content[records.ARRAYS])] for content in contents], 1)
            yield open_visit(
                self.method, self.network, self.schedule, round=told.round, clients=torch.tensor(group),
                data=pack(self.holdings.x, self.holdings.y, [owned[k] for k in group]),
                received=models.flatten(0, 1), sent=_side_by_side(contents),
                kept=[self._kept.get(k, {}) for k in group],
            )  # fmt: skip


def _side_by_side(contents: Sequence[RecordDict]) -> dict[str, Tensor]:
    """What a method's server sent to the clients of a group."""
    each = [records.read_tensors(one[records.SENT]) for one in contents if records.SENT in one.array_records]
    return {name: torch.stack([sent[name] for sent in each]) for name in (each[0] if each else ())}
