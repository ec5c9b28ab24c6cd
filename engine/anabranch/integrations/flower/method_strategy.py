"""`MethodStrategy`: the server of a federated method, as a strategy of Flower's.

    from anabranch.integrations.flower.method_strategy import MethodStrategy
    strategy = MethodStrategy(FedNoRo(warmup=10), network, schedule, clients=20)
    strategy.start(grid=grid, initial_arrays=strategy.initial_arrays(), num_rounds=30, evaluate_fn=...)

Nodes run method_app.py's `client_app`. It is the method that runs on one machine: of the same first model, cohorts and
clients the same models come, to the rounding of sums. Flower's round r is the method's round r - 1 of a schedule.

Nodes are asked for their clients' numbers when they are first seen. A cohort's clients without a node, and those whose
reply cannot be used (arrays that are missing, misshapen or not finite, or entries beside the model unlike most clients'
in name, shape or dtype), are left out, by name in the log and in `reasons`; the others' mean is a mean over them. A
survey needs all clients: while one has not answered the round is not held, and is tried again as the next.
A round whose replies are too few for the method, or make a model that is not finite, leaves everything as it was.
Numbers of examples, which weigh the models, are what nodes claim.

The round's MetricRecord has
  method.round     the method's, from 0
  method.clients   whose models were used, ascending
  method.left_out  ids of nodes whose answers were not
  method.skipped   1 where the arrays stayed as they were
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from logging import ERROR, INFO, WARNING
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from anabranch.federated.gathering import Gathering, first_server, in_order
from anabranch.federated.method import FedAvg, Replies
from anabranch.federated.networks.layout import Network
from anabranch.federated.robust_mean import conclude
from anabranch.federated.rounds import cohort
from anabranch.federated.schedule import Schedule
from anabranch.integrations.flower import method_records as records
from anabranch.integrations.flower.replies import examples, short

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
    from flwr.supercore import log
except ImportError as error:
    raise ImportError("MethodStrategy needs flwr>=1.40: pip install 'anabranch[flower]'") from error

R = TypeVar("R")
Entries = Mapping[str, Tensor]
MOST_EXAMPLES = 1 << 32


class Came(NamedTuple):
    """A usable reply: model [W, D] and the entries beside it."""

    model: Tensor
    samples: int
    extra: Entries


class MethodStrategy(Strategy):
    """See the module.

    clients              K, in all
    min_available_nodes  that a round waits for; None for K
    query_timeout_s      that nodes have for an answer outside training
    most_extra_bytes     that a client may send beside its model
    """

    def __init__(
        self,
        method: FedAvg,
        network: Network,
        schedule: Schedule,
        *,
        clients: int,
        min_available_nodes: int | None = None,
        query_timeout_s: float = 600.0,
        most_extra_bytes: int = 1 << 26,
    ) -> None:
        if clients < 1:
            raise ValueError(f"clients must be at least 1, got {clients}")
        self.method, self.network, self.schedule, self.clients = method, method.network(network), schedule, clients
        self.least_nodes = clients if min_available_nodes is None else min_available_nodes
        self.query_timeout_s, self.most_extra_bytes = query_timeout_s, most_extra_bytes
        self.server = first_server(method, self.network, clients, schedule.seed)
        self.round = 0
        self.federation = 1 + secrets.randbelow(1 << 62)
        self.reasons: dict[int, dict[int, str]] = {}
        self._node_of: dict[int, int] = {}
        self._answers: dict[int, Entries] = {}
        self._asked: dict[int, int] | None = None  # the cohort's clients by node; None where no round is held

    def initial_arrays(self) -> ArrayRecord:
        """The model as it is; before the first round the one that a run on one machine begins with."""
        return records.to_record(self.network.layout.named(self.server["model"]))

    def state(self) -> dict[str, Tensor]:
        """All that the server knows, for a file (safetensors); what clients keep is theirs."""
        own = {"round": torch.tensor(self.round), "federation": torch.tensor(self.federation)}
        return {**own, **{f"server.{name}": value for name, value in self.server.items()}}

    def load(self, state: Entries) -> None:
        """Go on from a state; `start` then takes `initial_arrays()` and the number of rounds that are left."""
        self.round, self.federation = int(state["round"]), int(state["federation"])
        server = "server."
        self.server = {name.removeprefix(server): t for name, t in state.items() if name.startswith(server)}
        self._answers = {}

    def summary(self) -> None:
        log(INFO, "\t├──> Method: %s", self.method)
        log(INFO, "\t└──> Clients: %s, %s in a round", self.clients, self.schedule.cohort_size(self.clients))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks what the method wants to know; the messages of its cohort, none if a survey is not complete."""
        reasons = self.reasons[server_round] = {}
        self._asked = None
        model = records.read_model(arrays, self.network.layout, self.method.networks)
        if not torch.equal(model, self.server["model"]):
            self.server, self._answers = {**self.server, "model": model}, {}
        self._meet(grid, reasons)
        if self.method.survey(self.round) and not self._survey(arrays, config, grid, reasons):
            return []
        chosen = cohort(self.schedule, self.clients, self.round).tolist()
        present = [k for k in chosen if k in self._node_of]
        self._asked = {self._node_of[k]: k for k in present}
        log(INFO, "configure_train: %s clients of a cohort of %s have nodes", len(present), len(chosen))
        return self._messages("train", present, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the method makes of the replies, or None where the arrays stay as they are; and the report."""
        reasons = self.reasons[server_round]
        came = _usable(replies, self._asked or {}, self._read, reasons)
        usual = _usual({k: one.extra for k, one in came.items()}, self.method.uneven)
        reasons |= {self._node_of[k]: "entries unlike those of most clients" for k in came.keys() - usual}
        report: dict[str, Any] = {"method.round": self.round, "method.clients": sorted(usual), "method.skipped": 0}
        try:
            if not usual:
                raise ValueError("no usable reply")
            server = conclude(self.method, self.server, self._gathered({k: came[k] for k in sorted(usual)}), self.round)
            if not bool(server["model"].isfinite().all()):
                raise ValueError("the model is not finite")
            self.server = server
        except (LookupError, RuntimeError, ValueError) as error:  # clients may send too little, or nonsense
            log(ERROR, "aggregate_train: the arrays stay as they were: %s", error)
            report["method.skipped"] = 1
        self.round += self._asked is not None
        for node, reason in sorted(reasons.items()):
            log(WARNING, "\t> Left out node %d: %s", node, reason)
        report["method.left_out"] = sorted(reasons)
        return None if report["method.skipped"] else self.initial_arrays(), MetricRecord(report)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: the model is evaluated by `evaluate_fn`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def _meet(self, grid: Grid, reasons: dict[int, str]) -> None:
        """Learn which client each node is that was not there before, and forget those that have gone."""
        while len(nodes := set(grid.get_node_ids())) < self.least_nodes:
            log(INFO, "Waiting for nodes: %d of %d are there", len(nodes), self.least_nodes)
            time.sleep(1)
        self._node_of = {k: node for k, node in self._node_of.items() if node in nodes}
        new = sorted(nodes - set(self._node_of.values()))
        messages = [_message(f"query.{records.WHO}", node, RecordDict()) for node in new]
        numbers = _usable(self._ask(grid, messages), {node: node for node in new}, self._number, reasons)
        for node, k in numbers.items():
            if k in self._node_of:
                reasons[node] = f"says that it is client {k}, as node {self._node_of[k]} does"
            else:
                self._node_of[k] = node

    def _survey(self, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, reasons: dict[int, str]) -> bool:
        """Ask the clients that have not answered yet; whether the method is settled."""
        missing = [k for k in range(self.clients) if k not in self._answers and k in self._node_of]
        messages = self._messages(f"query.{records.SURVEY}", missing, arrays, config)
        asked = {self._node_of[k]: k for k in missing}
        self._answers |= _usable(self._ask(grid, messages), asked, self._answer, reasons)
        usual = _usual(self._answers, frozenset())
        for k in self._answers.keys() - usual:
            del self._answers[k]
            if k in self._node_of:  # it may have gone since it answered
                reasons[self._node_of[k]] = "an answer unlike those of most clients"
        if len(self._answers) < self.clients:
            silent = [k for k in range(self.clients) if k not in self._answers]
            log(ERROR, "The round waits for a survey's answers of clients %s", silent)
            return False
        answers = [(torch.tensor([k]), _with_clients(one)) for k, one in self._answers.items()]
        self._answers = {}
        try:
            self.server = self.method.settle(self.server, in_order(answers), self.round)
        except (LookupError, RuntimeError, ValueError) as error:
            log(ERROR, "The round waits, since a survey's answers make no sense: %s", error)
            return False
        return True

    def _messages(self, kind: str, clients: list[int], arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
        sent = self.method.send(self.server, torch.tensor(clients, dtype=torch.int64), self.round)
        told = {records.ROUND: self.round + 1, records.FEDERATION: self.federation}
        config = ConfigRecord({**config, **told})
        messages = []
        for i, k in enumerate(clients):
            content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
            if sent:
                content[records.SENT] = records.of_client(sent, i)
            messages.append(_message(kind, self._node_of[k], content))
        return messages

    def _ask(self, grid: Grid, messages: list[Message]) -> Iterable[Message]:
        return grid.send_and_receive(messages, timeout=self.query_timeout_s) if messages else []

    def _number(self, content: RecordDict) -> int:
        told = content[records.CONFIG] if records.CONFIG in content.config_records else {}
        number = told.get(records.CLIENT)
        if type(number) is not int or not 0 <= number < self.clients:
            raise ValueError(f"its client's number is {number!r}, not one of {self.clients} from 0 on"[:200])
        return number

    def _answer(self, content: RecordDict) -> Entries:
        return self._extra(content, {records.EXTRA})

    def _read(self, content: RecordDict) -> Came:
        if records.ARRAYS not in content.array_records or len(content.metric_records) != 1:
            raise ValueError(f"an ArrayRecord {records.ARRAYS!r} and one MetricRecord are wanted")
        model = records.read_model(content[records.ARRAYS], self.network.layout, self.method.networks)
        count = examples(content, records.EXAMPLES)
        if count != int(count) or count > MOST_EXAMPLES:
            raise ValueError(f"{records.EXAMPLES} is {count}, not a whole number up to 2^32")
        return Came(model, int(count), self._extra(content, {records.ARRAYS, records.EXTRA}))

    def _extra(self, content: RecordDict, known: set[str]) -> Entries:
        if more := sorted(content.array_records.keys() - known):
            raise ValueError(f"unknown records {more}"[:200])
        record = content.array_records.get(records.EXTRA, ArrayRecord())
        if (size := records.size_bytes(record)) > self.most_extra_bytes:
            raise ValueError(f"{size} bytes beside the model, at most {self.most_extra_bytes} are taken")
        return records.read_tensors(record)

    def _gathered(self, came: Mapping[int, Came]) -> Replies:
        clients = torch.tensor(list(came))
        counts = torch.tensor([one.samples for one in came.values()])
        gathering = Gathering(self.method, self.network, self.server["model"], clients, counts)
        for k, one in came.items():
            gathering.take(torch.tensor([k]), one.model, _with_clients(one.extra))
        return gathering.replies()


def _message(kind: str, node: int, content: RecordDict) -> Message:
    return Message(content=content, message_type=kind, dst_node_id=node)


def _with_clients(entries: Entries) -> dict[str, Tensor]:
    """Of one client, as of N."""
    return {name: value[None] for name, value in entries.items()}


def _usable(
    replies: Iterable[Message], asked: Mapping[int, int], read: Callable[[RecordDict], R], reasons: dict[int, str]
) -> dict[int, R]:
    """What was read of each client's reply, by its number; of others it is said why not, by node."""
    found: dict[int, R] = {}
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise ValueError(f"failed: {reply.error.reason}")
            if node not in asked:
                raise ValueError("was not asked")
            if asked[node] in found:
                raise ValueError("a second reply")
            found[asked[node]] = read(reply.content)
        except ValueError as error:
            reasons[node] = short(str(error))
    for node, k in asked.items():
        if k not in found:
            reasons.setdefault(node, "did not answer")
    return found


def _usual(entries: Mapping[int, Entries], uneven: frozenset[str]) -> set[int]:
    """Clients whose entries have the names, dtypes and shapes that most clients' have. Of uneven entries [things, ...]
    a client may have more or fewer things than others, but as many by each name.
    """

    def form(of_client: Entries) -> tuple[Any, ...]:
        shapes = {name: tuple(value.shape) for name, value in of_client.items()}
        things = {shapes[name][:1] for name in of_client.keys() & uneven}
        shown = [(n, str(of_client[n].dtype), shape[1:] if n in uneven else shape) for n, shape in shapes.items()]
        return len(things) <= 1 and () not in things, tuple(sorted(shown))

    forms = {k: form(one) for k, one in entries.items()}
    well = Counter(form for form in forms.values() if form[0]).most_common(1)
    return {k for k, form in forms.items() if well and form == well[0][0]}
