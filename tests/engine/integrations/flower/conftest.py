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


@pytest.fixture
def descend() -> Callable[..., Any]:
    """Five steps on an eighth of scikit-learn's digits: (arrays, partition) -> ({"w", "b"} in float64, examples).

    It stands inside, so that Ray's workers get it whole: they cannot import tests.
    """

    def on_digits(arrays, partition):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, y = x[partition::8] / 16, np.eye(10)[y[partition::8]]
        w, b = (arrays[name].astype(np.float64) for name in ("w", "b"))
        for _ in range(5):
            z = x @ w + b
            p = np.exp(z - z.max(1, keepdims=True))
            slope = (p / p.sum(1, keepdims=True) - y) / len(x)
            w, b = w - x.T @ slope, b - slope.sum(0)
        return {"w": w, "b": b}, len(x)

    return on_digits


@pytest.fixture
def simulate() -> Callable[..., None]:
    """`simulate(server_app, client_app)`: eight SuperNodes, unless it is said how many, on Ray with two cores."""
    from flwr.simulation import run_simulation

    def run(server, client, nodes=8):
        run_simulation(
            server,
            client,
            num_supernodes=nodes,
            backend_config={
                "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )

    return run
