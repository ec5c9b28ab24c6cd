"""Which replies of a round can be used. Of the others it is said why not; none of them stops the round."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.integrations.flower.arrays import Sent, read_record


class Update(NamedTuple):
    """A usable reply: `row` [D] is what its floats differ by from those sent out; `others` are not floats."""

    node: int
    row: Tensor
    others: dict[str, np.ndarray]
    examples: float
    content: Any  # flwr.app.RecordDict


def sort_replies(
    replies: Iterable[Any], sent: Sent, weighted_by: str
) -> tuple[list[Update], dict[int, str], list[int]]:
    """Usable replies (`flwr.app.Message`), the reasons against others by node, and the nodes that reported an error.

    All in the order of the nodes' ids: what is made of them does not depend on who answers first.
    """
    usable: list[Update] = []
    left_out: dict[int, str] = {}
    failed: list[int] = []
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if reply.has_error():
            failed.append(node)
            continue
        try:
            if usable and usable[-1].node == node:
                raise ValueError("a second reply")
            usable.append(read_update(node, reply.content, sent, weighted_by))
        except ValueError as error:
            left_out[node] = str(error)
    return usable, left_out, failed


def read_update(node: int, content: Any, sent: Sent, weighted_by: str) -> Update:
    """The content of one reply; raises ValueError that says why it cannot be used."""
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        counts = f"{len(content.array_records)} and {len(content.metric_records)}"
        raise ValueError(f"one ArrayRecord and one MetricRecord are wanted, not {counts}")
    (record,) = content.array_records.values()
    arrays = read_record(record, sent.arrays)
    row = sent.vector(arrays).sub_(sent.vector(sent.arrays))
    if not bool(torch.isfinite(row).all()):
        raise ValueError("not finite")
    return Update(node, row, {name: arrays[name] for name in sent.others}, examples(content, weighted_by), content)


def examples(content: Any, weighted_by: str) -> float:
    """The number that weighs a reply. Raises ValueError unless it is one number, positive and finite."""
    (metrics,) = content.metric_records.values()
    value = metrics.get(weighted_by)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"metric {weighted_by!r} is {value!r}, not a positive number"[:200])
    return float(value)


def short(reason: str) -> str:
    """Ray puts a stack before what went wrong."""
    return reason if len(reason) <= 400 else f"{reason[:100]} … {reason[-300:]}"


def with_usual_metrics(contents: list[Any]) -> list[Any]:
    """Those whose metrics are finite and named and shaped as most are, so that they can be averaged."""

    def form(content: Any) -> tuple:
        (metrics,) = content.metric_records.values()
        return tuple(sorted((name, len(v) if isinstance(v, list) else -1) for name, v in metrics.items()))

    def is_finite(content: Any) -> bool:
        (metrics,) = content.metric_records.values()
        return all(math.isfinite(x) for v in metrics.values() for x in (v if isinstance(v, list) else [v]))

    finite = [content for content in contents if is_finite(content)]
    usual = Counter(map(form, finite)).most_common(1)
    return [content for content in finite if form(content) == usual[0][0]]
