"""What the messages of a federated method hold: the model's tensors by their names, and what goes beside them.

    query.client   nothing                             ->  config: client, its number
    query.survey   arrays, config, perhaps sent        ->  extra, the answer
    train          arrays, config, perhaps sent        ->  arrays, metrics: num-examples, perhaps extra

The config has server-round, and federation: a number that tells a run of MethodStrategy from others. `sent` is what the
method's `send` gave this client, `extra` what its `reply` gave. A method without them has messages as Flower's own
strategies send and read them, and as secure sums do.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch.federated.networks.layout import Layout
from anabranch.integrations.flower.arrays import read_record, read_tensor

try:
    from flwr.app import Array, ArrayRecord
except ImportError as error:
    raise ImportError("methods on Flower need flwr>=1.40: pip install 'anabranch[flower]'") from error

ARRAYS, SENT, EXTRA, CONFIG, METRICS = "arrays", "sent", "extra", "config", "metrics"
ROUND, EXAMPLES, CLIENT, FEDERATION = "server-round", "num-examples", "client", "federation"
WHO, SURVEY = "client", "survey"  # what is queried


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Arrays of NumPy's format, one for each tensor."""
    return ArrayRecord({name: Array(tensor.contiguous().numpy()) for name, tensor in tensors.items()})


def of_client(tensors: Mapping[str, Tensor], i: int = 0) -> ArrayRecord:
    """Entries of one of N clients."""
    return to_record({name: tensor[i] for name, tensor in tensors.items()})


def read_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Of any names and shapes. ValueError for what is no tensor, or not finite."""
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = read_tensor(array)
            if not bool(tensors[name].isfinite().all()):
                raise ValueError("not finite")
        except ValueError as error:
            raise ValueError(f"array {name!r}: {error}"[:200]) from error
    return tensors


def read_model(record: ArrayRecord, layout: Layout, networks: int) -> Tensor:
    """[W, D] float32. ValueError unless it has the layout's names and shapes, floats, all finite."""
    like = {name: tensor.numpy() for name, tensor in layout.named(torch.empty(networks, layout.size)).items()}
    with np.errstate(over="ignore"):
        read = {name: array.astype(np.float32) for name, array in read_record(record, like).items()}
    model = layout.model({name: torch.from_numpy(array) for name, array in read.items()})
    if not bool(model.isfinite().all()):
        raise ValueError("not finite")
    return model


def size_bytes(record: ArrayRecord) -> int:
    """As it was sent."""
    return sum(len(array.data) for array in record.values())


class Told(NamedTuple):
    """round  the method's, from 0; Flower counts from 1
    federation  0 under Flower's own strategies
    """

    round: int
    federation: int


def told_by(content: Any) -> Told:
    """What the config of a message says. ValueError where it does not."""
    config = content[CONFIG] if CONFIG in content.config_records else {}
    round, federation = config.get(ROUND), config.get(FEDERATION, 0)
    if type(round) is not int or round < 1 or type(federation) is not int:
        raise ValueError(f"a ConfigRecord {CONFIG!r} with {ROUND!r}, an integer from 1 on, is wanted, got {round!r}")
    return Told(round - 1, federation)
