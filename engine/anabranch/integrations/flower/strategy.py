"""`RobustFedAvg`: Flower's FedAvg with a robust rule in the place of the mean.

    from anabranch import AggregateMethod
    from anabranch.integrations.flower.strategy import RobustFedAvg
    strategy = RobustFedAvg(AggregateMethod(rule="geometric-median", pre=("nnm",), f=2), fraction_evaluate=0.5)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=10)

Written for Flower's Message API (flwr.serverapp.strategy, 1.40 and newer). Clients need nothing of this package.

Replies that cannot be used (arrays that are missing, misshapen or not finite) are left out, named in the log and the
report, and counted among the f. A round with too few replies for its rule leaves the arrays as they are. The result
depends on what nodes sent, never on who answered first.

The round's MetricRecord holds the clients' own metrics, averaged by FedAvg's function, and this report:
  robust.nodes                   ids of the nodes whose updates were used, ascending
  robust.coefficients[.array]    theirs in the result, in that order; of each array with per_tensor; none for
                                 rules of coordinates
  robust.distances[.array]       of their updates to the result
  robust.gap_rel                 bound of the geometric median's objective above the least (the worst of all arrays)
  robust.outliers                ids of nodes unusually far from the result, in any array
  robust.left_out, robust.failed ids of nodes with unusable replies, and of those that reported an error
  robust.skipped                 1 where the arrays stayed as they were
"""

from collections.abc import Callable, Iterable
from logging import ERROR, INFO, WARNING
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.aggregate.robust import ROOTED, Outcome, aggregate_updates
from anabranch.aggregate.settings import RULES, AggregateMethod
from anabranch.aggregate.sweep import lower_median
from anabranch.integrations.flower.arrays import Sent
from anabranch.integrations.flower.replies import Update, examples, sort_replies, with_usual_metrics

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore import log
except ImportError as error:
    raise ImportError("RobustFedAvg needs flwr>=1.40: pip install 'anabranch[flower]'") from error

DEFAULT = AggregateMethod()
RootFunction = Callable[[int, ArrayRecord], ArrayRecord]


class RobustFedAvg(FedAvg):
    """FedAvg whose `aggregate_train` is a rule with the steps before it.

    method      as for files (AggregateMethod); `own` or `root` is 0 where there is one: the server's own update
    per_tensor  the rule is applied to each array, instead of all of a client's as one vector
    weighted    weigh by the clients' numbers of examples, about which they may lie
    root        for fltrust and nearest-neighbours: (round, arrays sent out) -> the server's own arrays after training
    **fedavg    arguments of `flwr.serverapp.strategy.FedAvg`

    Arrays that are not floats (counters) become the median of each element. foolsgold keeps the sum of every node's
    updates in memory.
    """

    def __init__(
        self,
        method: AggregateMethod = DEFAULT,
        *,
        per_tensor: bool = False,
        weighted: bool = False,
        root: RootFunction | None = None,
        **fedavg: Any,
    ) -> None:
        if (method.rule in ROOTED) != (root is not None):
            raise ValueError(f"root is for {' and '.join(ROOTED)}, which need it; got root={root} for {method.rule}")
        if method.root or method.own or method.weights is not None:
            raise ValueError("the server's own update is client 0, and clients' weights are asked for by `weighted`")
        if weighted and "weights" not in RULES[method.rule]:
            raise ValueError(f"{method.rule} takes no weights")
        super().__init__(**fedavg)
        self.method, self.per_tensor, self.weighted, self.root = method, per_tensor, weighted, root
        self._sent: ArrayRecord | None = None
        self._history: dict[int, Tensor] = {}

    def summary(self) -> None:
        log(INFO, "\t├──> Robust rule: %s%s", self.method.title, ", each array by itself" if self.per_tensor else "")
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg's; the arrays are kept, since the rule is about what clients change in them."""
        self._sent = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """New arrays, or None where they stay as they are; the clients' metrics and the report."""
        if self._sent is None:
            raise ValueError("configure_train has to come first: updates are differences from what it sent out")
        sent = Sent({name: array.numpy() for name, array in self._sent.items()})
        usable, left_out, failed = sort_replies(replies, sent, self.weighted_by_key)
        log(INFO, "aggregate_train: %s usable, %s unusable, %s failed", len(usable), len(left_out), len(failed))
        for node, reason in left_out.items():
            log(WARNING, "\t> Left out node %d: %s", node, reason)
        if not usable and not left_out and not failed:
            return None, None
        metrics = self._train_metrics(usable)
        metrics |= {"robust.left_out": list(left_out), "robust.failed": failed, "robust.skipped": 0}
        metrics |= {"robust.nodes": [update.node for update in usable]}
        root = None if self.root is None else self.root(server_round, self._sent)
        try:
            arrays, report = self._combine(server_round, sent, usable, len(left_out), root)
        except (ValueError, RuntimeError) as error:  # too few replies for the rule: the next round may have more
            log(ERROR, "aggregate_train: the arrays stay as they were: %s", error)
            return None, MetricRecord(metrics | {"robust.skipped": 1})
        return arrays, MetricRecord(metrics | report)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """FedAvg's average over the replies that can be averaged."""
        contents = []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise ValueError(reply.error.reason)
                if len(reply.content.metric_records) != 1:
                    raise ValueError(f"one MetricRecord is wanted, not {len(reply.content.metric_records)}")
                examples(reply.content, self.weighted_by_key)
                contents.append(reply.content)
            except ValueError as error:
                log(WARNING, "aggregate_evaluate: left out node %d: %s", node, error)
        contents = with_usual_metrics(contents)
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def _train_metrics(self, usable: list[Update]) -> dict[str, Any]:
        contents = with_usual_metrics([update.content for update in usable])
        return dict(self.train_metrics_aggr_fn(contents, self.weighted_by_key)) if contents else {}

    def _combine(
        self, server_round: int, sent: Sent, usable: list[Update], left_out: int, root: ArrayRecord | None
    ) -> tuple[ArrayRecord, dict[str, Any]]:
        if not usable:
            raise ValueError("no usable reply")
        rows = torch.stack([update.row for update in usable])
        weights = [update.examples for update in usable] if self.weighted else None
        own, history = None if root is None else _row(root, sent), self._remember(usable)
        whole = {"": slice(None)}
        outcomes: dict[str, Outcome] = {}
        for name, part in (sent.slices() if self.per_tensor else whole).items():
            outcomes[name] = aggregate_updates(
                rows[:, part],
                self.method,
                round=server_round,
                left_out=left_out,
                weights=weights,
                root=None if own is None else own[part],
                history=None if history is None else history[:, part],
            )
        update = torch.cat([outcome.update for outcome in outcomes.values()])
        others = {name: lower_median(np.stack([each.others[name] for each in usable])) for name in sent.others}
        arrays = ArrayRecord({name: Array(array) for name, array in sent.moved(update, others).items()})
        return arrays, _report([update.node for update in usable], outcomes)

    def _remember(self, usable: list[Update]) -> Tensor | None:
        if self.method.rule != "foolsgold":
            return None
        for update in usable:
            past = self._history.get(update.node)
            self._history[update.node] = update.row if past is None else past + update.row
        return torch.stack([self._history[update.node] for update in usable])


def _row(arrays: ArrayRecord, sent: Sent) -> Tensor:
    own = {name: array.numpy() for name, array in arrays.items()}
    return sent.vector(own).sub_(sent.vector(sent.arrays))


def _report(nodes: list[int], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    far = torch.zeros(len(nodes), dtype=torch.bool)
    for name, outcome in outcomes.items():
        suffix = f".{name}" if name else ""
        if outcome.coefficients is not None:
            report[f"robust.coefficients{suffix}"] = outcome.coefficients.tolist()
        report[f"robust.distances{suffix}"] = outcome.distances.tolist()
        far |= outcome.outliers
    gaps = [outcome.gap_rel for outcome in outcomes.values() if outcome.gap_rel is not None]
    if gaps:
        report["robust.gap_rel"] = max(gaps)
    return report | {"robust.outliers": [node for node, is_far in zip(nodes, far.tolist(), strict=True) if is_far]}
