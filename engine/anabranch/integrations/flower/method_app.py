"""`client_app`: a client of a federated method, as Flower's ClientApp.

    from anabranch.integrations.flower.method_app import client_app
    app = client_app(CoTeaching(), network, schedule, data=lambda context: (x, y))

It is the method that runs on one machine (federated/rounds.py), unchanged: the same samples, batches and random numbers
give the same model. Client k of K is the node whose `partition-id` is k. What the client keeps from one visit to the
next (learned labels, say) stays in context.state until another MethodStrategy comes.

MethodStrategy drives every method. Those that send nothing beside the model (method_records.py) also run under Flower's
own strategies with `fraction_evaluate=0.0`, and as secure sums with `mods=[SecureMod(...)]` under SecureFedAvg.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anabranch.federated.gathering import kept_by_each, open_visit, pay
from anabranch.federated.method import FedAvg, Visit
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import pack
from anabranch.federated.schedule import Schedule
from anabranch.integrations.flower import method_records as records

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.typing import Mod
except ImportError as error:
    raise ImportError("client_app needs flwr>=1.40: pip install 'anabranch[flower]'") from error

KEPT, BY = "anabranch.kept", "anabranch.kept.by"  # an ArrayRecord in context.state, and whose it is
Samples = tuple[Tensor, Tensor]


def client_app(
    method: FedAvg,
    network: Network,
    schedule: Schedule,
    *,
    data: Callable[[Context], Samples],
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """An app that trains one client of a federation, and answers for it.

    schedule  the server's, to the seed
    data      the client's own samples: x [n, ...] and labels y [n] int64, n >= 1, the same ones in the same order in
              every round
    """
    network = method.network(network)
    app = ClientApp(mods=list(mods))

    @app.query(records.WHO)
    def who(message: Message, context: Context) -> Message:
        content = {records.CONFIG: ConfigRecord({records.CLIENT: number_of(context)})}
        return Message(RecordDict(content), reply_to=message)

    @app.query(records.SURVEY)
    def answer(message: Message, context: Context) -> Message:
        given = method.answer(_visit(method, network, schedule, data(context), message, context))
        return Message(RecordDict({records.EXTRA: records.of_client(given)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visit = _visit(method, network, schedule, data(context), message, context)
        rows, extra = pay(method, visit)
        if visit.kept:
            (kept,) = kept_by_each(method, visit)
            context.state[KEPT] = records.to_record(kept)
            context.state[BY] = ConfigRecord({records.FEDERATION: records.told_by(message.content).federation})
        return Message(trained(network, rows, len(visit.data.y[0]), records.of_client(extra)), reply_to=message)

    return app


def trained(network: Network, model: Tensor, examples: int, extra: ArrayRecord) -> RecordDict:
    """What a client sends after training: its model [W, D] and, if there is anything, what is beside it."""
    content = RecordDict({
        records.ARRAYS: records.to_record(network.layout.named(model)),
        records.METRICS: MetricRecord({records.EXAMPLES: examples}),
    })  # fmt: skip
    if extra:
        content[records.EXTRA] = extra
    return content


def number_of(context: Context) -> int:
    """The client's, which a simulation gives and a SuperNode is started with: --node-config "partition-id=3"."""
    number = context.node_config.get("partition-id")
    if type(number) is not int or number < 0:
        raise ValueError(f"the node's config has no partition-id from 0 on, the client's number; got {number!r}")
    return number


def _visit(
    method: FedAvg, network: Network, schedule: Schedule, samples: Samples, message: Message, context: Context
) -> Visit:
    content, told, (x, y) = message.content, records.told_by(message.content), samples
    if len(x) != len(y) or len(y) < 1 or y.ndim != 1 or y.dtype != torch.int64:
        raise ValueError(
            f"a client's data are x [n, ...] and y [n] int64, n >= 1, got {list(x.shape)} and {list(y.shape)} {y.dtype}"
        )
    if content.array_records.keys() - {records.ARRAYS, records.SENT}:
        raise ValueError(f"unknown records {sorted(content.array_records)}")
    sent = records.read_tensors(content[records.SENT]) if records.SENT in content.array_records else {}
    known = BY in context.state and context.state[BY][records.FEDERATION] == told.federation
    return open_visit(
        method, network, schedule, round=told.round, clients=torch.tensor([number_of(context)]),
        data=pack(x, y, [torch.arange(len(y))]),
        received=records.read_model(content[records.ARRAYS], network.layout, method.networks),
        sent={name: value[None] for name, value in sent.items()},
        kept=[records.read_tensors(context.state[KEPT]) if known else {}],
    )  # fmt: skip
