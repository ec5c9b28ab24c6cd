"""`SecureFedAvg`: FedAvg whose server learns the sum of the updates, and of each update nothing else.

    from anabranch.integrations.flower.secure_strategy import SecureFedAvg, SecureSum
    strategy = SecureFedAvg(SecureSum(privacy=2, errors=1, dropouts=1), min_train_nodes=8)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=10)

Nodes need `SecureMod`. Every round is a session of its own (docs/secure-aggregation.md) among the nodes whose training
succeeded: those that fail before it cost none of the D, and a node that lost its state comes back in the next round.
The new arrays are those sent plus the mean of the accepted updates, clipped and rounded to 2^-fraction_bits; arrays
that are not floats stay as they were. A round without enough answers at any step leaves all arrays as they are.

Keys: the first one that a node shows is remembered, and another is refused later (trust on first use: it helps nobody
against a server that lies). Give `keys` to know them before; nodes check each other's with `SecureMod(known=...)`.

The round's MetricRecord holds the nodes' own metrics, which are not secret, averaged by FedAvg's function, and
  secure.nodes     ids of the nodes in the sum, ascending, and secure.weights, theirs
  secure.excluded  ids of nodes with usable training that are not in it
  secure.wrong     ids of nodes whose coded sums or projections were wrong; nothing of theirs was used
  secure.left_out  ids of nodes whose reply to training, or key, could not be used
  secure.failed    ids of nodes that reported an error, fell silent or sent what does not belong there, at some step
  secure.clipped   numbers clipped, in all updates together, as the nodes say
  secure.proof     0, 1, 2 for V0, V1, V2
  secure.skipped   1 where the arrays stayed as they were
Reasons are texts, which a MetricRecord cannot hold: they are in the log and in `reasons`, by round and node.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from typing import Any

from anabranch.aggregate.secure.errors import ProtocolError
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.outcome import Outcome
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.sums import SumSettings
from anabranch.integrations.flower.arrays import Sent
from anabranch.integrations.flower.replies import examples, short, with_usual_metrics
from anabranch.integrations.flower.secure_mod import KEY

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore import log
except ImportError as error:
    raise ImportError("SecureFedAvg needs flwr>=1.40: pip install 'anabranch[flower,secure]'") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSum(SumSettings):
    """Of every round.

    most_weight     integer weights are numbers of examples, which nodes claim, scaled to 1 … most_weight; 1 for a mean
    step_timeout_s  that nodes have for each message after training
    """

    most_weight: int = 1
    step_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        SumSettings.__post_init__(self)
        if self.most_weight < 1 or not self.step_timeout_s > 0:
            raise ValueError(
                f"need most_weight >= 1 and step_timeout_s > 0, got {self.most_weight} and {self.step_timeout_s}"
            )
        self.check(self.most_weight)


@dataclass(frozen=True, slots=True)
class _Trained:
    """A node with an update to share."""

    node: int
    key: bytes
    examples: float
    content: RecordDict


class SecureFedAvg(FedAvg):
    """See the module.

    secure    sizes, precision, mode and proof
    identity  the server's key; None for a new one
    keys      public key of each node, by its id; others do not take part. None for trust on first use
    **fedavg  arguments of `flwr.serverapp.strategy.FedAvg`
    """

    def __init__(
        self,
        secure: SecureSum,
        *,
        identity: Identity | None = None,
        keys: Mapping[int, bytes] | None = None,
        **fedavg: Any,
    ) -> None:
        least = secure.least_clients
        for name in ("min_train_nodes", "min_available_nodes"):
            if fedavg.setdefault(name, least) < least:
                raise ValueError(f"{name} must be at least {least} for these K, T, E and D, got {fedavg[name]}")
        super().__init__(**fedavg)
        self.secure = secure
        self.reasons: dict[int, dict[int, str]] = {}
        self._identity = Identity() if identity is None else identity
        self._known, self._may_join = dict(keys or {}), keys is None
        self._sent: ArrayRecord | None = None
        self._grid: Grid | None = None

    def summary(self) -> None:
        s = self.secure
        sizes = f"K={s.blocks} T={s.privacy} E={s.errors} D={s.dropouts}"
        log(INFO, "\t├──> Secure sum: %s, mode %s, proof %s", sizes, s.mode, s.proof)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg's, for nodes that keep what they make of the arrays."""
        self._sent, self._grid = arrays, grid
        messages: list[Message] = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content[KEY] = ConfigRecord({"step": "train", "weighted_by": self.weighted_by_key})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drives the secure sum of the nodes that trained: new arrays, or None; metrics and the report."""
        if self._sent is None or self._grid is None:
            raise ValueError("configure_train has to come first: the sum is asked for over its grid")
        reasons = self.reasons[server_round] = {}
        trained, left_out, failed = self._sort(replies, reasons)
        if not trained and not reasons:
            return None, None
        contents = with_usual_metrics([one.content for one in trained])
        metrics = dict(self.train_metrics_aggr_fn(contents, self.weighted_by_key)) if contents else {}
        metrics |= {"secure.left_out": left_out, "secure.failed": failed, "secure.skipped": 0}
        session = _Session(self._grid, self.secure.step_timeout_s, [one.node for one in trained], reasons)
        sent, arrays = Sent({name: array.numpy() for name, array in self._sent.items()}), None
        try:
            parameters = self.secure.parameters(
                [one.key for one in trained],
                self._identity.public,
                length=sum(sent.arrays[name].size for name in sent.floats),
                weights=self._weights(trained),
            )
            server = Server(parameters, self._identity)
            outcome = session.run(server, server_round, parameters)
            others = {name: sent.arrays[name] for name in sent.others}
            moved = sent.moved(outcome.mean(parameters), others)
            arrays = ArrayRecord({name: Array(array) for name, array in moved.items()})
            metrics |= session.report(outcome)
        except ValueError as error:  # a ProtocolError, too: the next round may have more answers
            log(ERROR, "aggregate_train: the arrays stay as they were: %s", error)
            metrics["secure.skipped"] = 1
        metrics["secure.failed"] = sorted({*failed, *session.failed})
        for node, reason in sorted(reasons.items()):
            log(WARNING, "\t> Node %d: %s", node, reason)
        return arrays, MetricRecord(metrics)

    def _sort(self, replies: Iterable[Message], reasons: dict[int, str]) -> tuple[list[_Trained], list[int], list[int]]:
        """Nodes that trained, those whose reply is of no use, and those that reported an error; by id."""
        trained: list[_Trained] = []
        left_out, failed = [], []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if reply.has_error():
                failed.append(node)
                reasons[node] = short(f"failed to train: {reply.error.reason}")
                continue
            try:
                trained.append(self._trained(node, reply.content, trained))
            except ValueError as error:
                left_out.append(node)
                reasons[node] = str(error)
        return trained, left_out, failed

    def _trained(self, node: int, content: RecordDict, others: list[_Trained]) -> _Trained:
        if content.array_records:
            raise ValueError("it sent arrays; is SecureMod missing?")
        if len(content.metric_records) != 1 or KEY not in content.config_records:
            raise ValueError(f"one MetricRecord and a ConfigRecord {KEY!r} are wanted")
        key = content[KEY].get("identity")
        if type(key) is not bytes or len(key) != 32 or key == self._identity.public:
            raise ValueError("it shows no Ed25519 key of its own")
        if (self._known.setdefault(node, key) if self._may_join else self._known.get(node)) != key:
            raise ValueError("its key is not the one known")
        if any(key == other.key or node == other.node for other in others):
            raise ValueError("a second reply, or another node's key")
        return _Trained(node, key, examples(content, self.weighted_by_key), content)

    def _weights(self, trained: list[_Trained]) -> tuple[int, ...]:
        most = max((one.examples for one in trained), default=1.0)
        return tuple(max(1, round(self.secure.most_weight * one.examples / most)) for one in trained)


class _Session:
    """The messages of one round's session; client i is the i-th of the nodes."""

    def __init__(self, grid: Grid, timeout_s: float, nodes: list[int], reasons: dict[int, str]) -> None:
        self.nodes, self.reasons = nodes, reasons
        self.failed: set[int] = set()
        self.clipped = 0
        self._grid, self._timeout_s = grid, timeout_s

    def run(self, server: Server, number: int, parameters: Parameters) -> Outcome:
        """All steps; raises ProtocolError if too few nodes answer one of them."""
        hello = {"step": "hello", "parameters": parameters.encode()}
        self._receive(server, self._ask(dict.fromkeys(range(len(self.nodes)), hello)))
        rosters = server.advance()
        server.begin(number)
        answers = self._ask({i: {"step": "share", "round": number, "message": m} for i, m in rosters.items()})
        while server.outcome is None:
            self._receive(server, answers)
            answers = self._ask({i: {"step": "receive", "message": m} for i, m in server.advance().items()})
        said = [answer.get("clipped") for answer in answers.values()]
        self.clipped = sum(n for n in said if type(n) is int and 0 <= n <= parameters.length)
        return server.outcome

    def report(self, outcome: Outcome) -> dict[str, Any]:
        for i, reason in outcome.excluded:
            self.reasons.setdefault(self.nodes[i], reason)
        for i in outcome.wrong:
            self.reasons.setdefault(self.nodes[i], "its coded sum or its projection was wrong")
        return {
            "secure.nodes": [self.nodes[i] for i in outcome.accepted],
            "secure.weights": list(outcome.weights),
            "secure.excluded": [self.nodes[i] for i, _ in outcome.excluded],
            "secure.wrong": [self.nodes[i] for i in outcome.wrong],
            "secure.clipped": self.clipped,
            "secure.proof": int(outcome.proof[1:]),
        }

    def _ask(self, asked: Mapping[int, Mapping[str, Any]]) -> dict[int, ConfigRecord]:
        """The record that each client answers; those without one have failed."""
        messages = [
            Message(
                content=RecordDict({KEY: ConfigRecord(dict(record))}), message_type="train", dst_node_id=self.nodes[i]
            )
            for i, record in asked.items()
        ]
        step = next((record["step"] for record in asked.values()), "")
        answers: dict[int, ConfigRecord] = {}
        index = {self.nodes[i]: i for i in asked}
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout_s):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._fail(node, f"failed to {step}: {reply.error.reason}")
            elif node not in index or KEY not in reply.content.config_records:
                self._fail(node, f"answered {step} with something else")
            else:
                answers[index[node]] = reply.content[KEY]
        for i in asked:
            if i not in answers:
                self._fail(self.nodes[i], f"did not answer {step}")
        return answers

    def _receive(self, server: Server, answers: Mapping[int, ConfigRecord]) -> None:
        for i, answer in sorted(answers.items()):
            message = answer.get("message")
            if message is None:  # a client with nothing to say
                continue
            try:
                if type(message) is not bytes:
                    raise ProtocolError("unknown sender", "sent no bytes")
                server.receive(message)
            except ProtocolError as error:
                self._fail(self.nodes[i], str(error))

    def _fail(self, node: int, reason: str) -> None:
        """The first reason is the one that counts."""
        self.failed.add(node)
        self.reasons.setdefault(node, short(reason))
