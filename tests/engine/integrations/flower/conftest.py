"""Replies of Flower's nodes, made by hand. Nothing here or in Flower calls home."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def reply() -> Callable[..., Any]:
    """`reply(node, {"w": array}, loss=0.5)`, or `reply(node, error="...")`: a Message from that node."""
    from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
    from flwr.app.metadata import Metadata

    def make(node, arrays=None, *, error=None, examples=10, **metrics):
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=node, dst_node_id=1, reply_to_message_id="", group_id="",
            created_at=0.0, ttl=1.0, message_type="train",
        )  # fmt: skip
        if error is not None:
            return Message(error=Error(code=1, reason=error), metadata=metadata)
        as_array = lambda value: Array(value) if isinstance(value, np.ndarray) else value
        records: dict[str, Any] = {"metrics": MetricRecord({"num-examples": examples, **metrics})}
        if arrays is not None:
            records["arrays"] = ArrayRecord({name: as_array(value) for name, value in arrays.items()})
        return Message(content=RecordDict(records), metadata=metadata)

    return make
