"""The federated methods over grids in this process and over Flower's simulation: the models of one machine."""

import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr.app", reason="needs the extra `flower`")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common import serde
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.choices import METHODS, choose_method
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.clipping import Clipping
from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.methods.fedcfa import FedCFA
from anabranch.federated.methods.fednoro import FedNoRo
from anabranch.federated.methods.joint_optim import JointOptim
from anabranch.federated.methods.maskedoptim import MaskedOptim
from anabranch.federated.methods.robustfl import RobustFL
from anabranch.federated.methods.symmetric_ce import SymmetricCE
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, cohort, found, run_round, visit_all
from anabranch.federated.schedule import Schedule
from anabranch.integrations.flower.fused_grid import FIRST_NODE, FusedGrid
from anabranch.integrations.flower.method_app import KEPT, client_app
from anabranch.integrations.flower.method_strategy import MethodStrategy

COUNTS = (7, 2, 9, 5, 4)  # samples of each client
NETWORK = MLP((6, 7, 3))
NODE = 1000 - 7 * 3  # client 3's
SCHEDULE = Schedule(rounds=3, share=0.8, epochs=1, batch=4, seed=3)  # client 2 is not in the first cohort
WARMUPS = {"warmup": 1, "warm_up": 1, "ramp": 2, "trust": 1}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # sums are in another order


def holdings(counts=COUNTS):
    generator, M = torch.Generator().manual_seed(1), sum(counts)
    x = torch.randn(M, 6, generator=generator)
    return Holdings(x, torch.randint(0, 3, (M,), generator=generator), torch.arange(M).split(list(counts)))


def short(name):
    """A method whose later stages begin within three rounds, with f that four clients allow."""
    method = choose_method(name).method
    chosen = {option: rounds for option, rounds in WARMUPS.items() if hasattr(method, option)}
    if getattr(getattr(method, "method", None), "f", 0):
        chosen["method"] = replace(method.method, f=1)
    return replace(method, **chosen)


def on_one_machine(method, rounds=3, schedule=SCHEDULE, held=None):
    federation = found(method, NETWORK, held or holdings(), schedule)
    for _ in range(rounds):
        run_round(federation)
    return federation


class Grid:
    """Runs each message in an app of its own; what crosses it, contexts too, has been through Flower's wire format.

    hostile  (node, kind of message) -> what to do with the reply, or an error
    """

    def __init__(self, method, hostile=None, schedule=SCHEDULE):
        self.method, self.schedule, self.hostile = method, schedule, hostile or {}
        self.nodes = {1000 - 7 * k: k for k in range(len(COUNTS))}  # in another order than the clients
        self.contexts = {
            node: serde.context_to_proto(Context(1, node, {"partition-id": k}, RecordDict(), {}))
            for node, k in self.nodes.items()
        }
        self.seen = []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            self.seen.append(message.metadata.message_type)
            yield from self._run(message)

    def _run(self, sent):
        node, kind = sent.metadata.dst_node_id, sent.metadata.message_type.partition(".")[0]
        message = serde.message_from_proto(serde.message_to_proto(sent))
        message.metadata.__dict__["_message_id"] = "m"
        context = serde.context_from_proto(self.contexts[node])
        held = holdings()
        mine = held.owned[self.nodes[node]]
        app = client_app(self.method, NETWORK, self.schedule, data=lambda context: (held.x[mine], held.y[mine]))
        what = self.hostile.get((node, kind))
        try:
            if isinstance(what, str):
                raise RuntimeError(what)
            reply = app(message, context)
        except Exception as error:
            yield Message(Error(1, str(error)), reply_to=message)
            return
        self.contexts[node] = serde.context_to_proto(context)
        replies = what(reply) if what else [reply]
        yield from (serde.message_from_proto(serde.message_to_proto(one)) for one in replies)


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """Flower makes messages only where it knows which run it is in."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def over(grid, method, rounds=3, **options):
    strategy = MethodStrategy(method, NETWORK, SCHEDULE, clients=len(COUNTS), **options)
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=rounds)
    return strategy, result


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_the_one_on_one_machine(name):
    """Through the wire, client by client; and fused."""
    method = short(name)
    alone = on_one_machine(method)
    for grid in (Grid(method), FusedGrid(method, NETWORK, SCHEDULE, holdings(), threads=2)):
        strategy, result = over(grid, method)
        assert not any(strategy.reasons.values())
        assert set(strategy.server) == set(alone.server)
        for key, value in alone.server.items():
            torch.testing.assert_close(strategy.server[key], value, **CLOSE, msg=key)
        sent = {key: torch.from_numpy(array.numpy()) for key, array in result.arrays.items()}
        torch.testing.assert_close(alone.network.layout.model(sent), alone.server["model"], **CLOSE)
        assert result.train_metrics_clientapp[2]["method.skipped"] == 0


def test_a_rule_takes_the_place_of_the_mean():
    method = SymmetricCE(mean=AggregateMethod(rule="coordinate-median"))
    expected = on_one_machine(method).server["model"]
    strategy, _ = over(Grid(method), method)
    torch.testing.assert_close(strategy.server["model"], expected, **CLOSE)
    assert not torch.allclose(expected, on_one_machine(SymmetricCE()).server["model"], **CLOSE)


def test_what_is_used_of_a_method():
    """The cases above are of surveys, of clients that keep something and of messages with more than the model."""
    grid = Grid(method := short("maskedoptim"))
    over(grid, method)
    assert grid.seen.count("query.survey") == len(COUNTS)
    assert grid.seen.count("query.client") == len(COUNTS)  # once
    assert grid.seen.count("train") == 3 * 4
    state = [serde.context_from_proto(context).state for context in grid.contexts.values()]
    assert sorted(len(one[KEPT]["labels"].numpy()) for one in state) == sorted(COUNTS)


def test_a_state_goes_on():
    method = short("robustfl")
    grid = Grid(method)
    first, _ = over(grid, method, rounds=1)
    strategy = MethodStrategy(method, NETWORK, SCHEDULE, clients=len(COUNTS))
    strategy.load({name: value.clone() for name, value in first.state().items()})
    strategy.start(grid, strategy.initial_arrays(), num_rounds=2)
    torch.testing.assert_close(strategy.server["model"], on_one_machine(method).server["model"], **CLOSE)


def test_an_app_begins_anew_with_a_federation():
    method = short("joint-optim")
    grid = Grid(method)
    over(grid, method)
    strategy, _ = over(grid, method)
    torch.testing.assert_close(strategy.server["model"], on_one_machine(method).server["model"], **CLOSE)


@pytest.mark.parametrize("method", [FedAvg(), Clipping(limit=1.0), CoTeaching(ramp=2), JointOptim(warm_up=1)], ids=type)
def test_flowers_own_fedavg_over_a_fused_grid(method):
    schedule = replace(SCHEDULE, share=1.0)
    grid = FusedGrid(method, NETWORK, schedule, holdings())
    strategy = FlowersFedAvg(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=5)
    result = strategy.start(grid, grid.initial_arrays(), num_rounds=3)
    model = NETWORK.layout.model({key: torch.from_numpy(array.numpy()) for key, array in result.arrays.items()})
    torch.testing.assert_close(model, on_one_machine(method, schedule=schedule).server["model"], **CLOSE)


def test_a_fused_grid_only_trains():
    grid = FusedGrid(FedAvg(), NETWORK, SCHEDULE, holdings())
    ask = lambda kind: Message(RecordDict(), message_type=kind, dst_node_id=FIRST_NODE)
    (reply,) = grid.send_and_receive([ask("evaluate")])
    assert "it has no 'evaluate'" in reply.error.reason
    with pytest.raises(ValueError, match="two messages 'train' to client 0"):
        grid.send_and_receive([ask("train"), ask("train")])


def without(client, method):
    """What the server knows after a round in which a client failed."""
    federation = found(method, NETWORK, holdings(), SCHEDULE)
    clients = cohort(SCHEDULE, len(COUNTS), 0)
    replies = visit_all(federation, clients[clients != client], threads=1)
    return method.aggregate(federation.server, replies, 0)


def arrays(reply, record="arrays", **changed):
    """With some arrays exchanged; None to leave one out."""
    now = dict(reply.content[record].items())
    for name, array in changed.items():
        now[name] = array if array is None or isinstance(array, Array) else Array(np.asarray(array))
    reply.content[record] = ArrayRecord({name: array for name, array in now.items() if array is not None})
    return [reply]


def with_metrics(**metrics):
    def change(reply):
        reply.content["metrics"] = MetricRecord(metrics)
        return [reply]

    return change


def with_record(reply):
    reply.content["more"] = ArrayRecord({"w": Array(np.zeros(3))})
    return [reply]


HOSTILE = {
    "fails": ("out of memory", "out of memory"),
    "silent": (lambda reply: [], "did not answer"),
    "misshapen": (lambda reply: arrays(reply, **{"0.bias": np.zeros(8, np.float32)}), r"array '0.bias': float32 \[8\]"),
    "missing": (lambda reply: arrays(reply, **{"0.bias": None}), "missing arrays"),
    "more": (lambda reply: arrays(reply, **{"0.more": np.zeros(8)}), "unknown arrays"),
    "nan": (lambda reply: arrays(reply, **{"0.bias": np.full(7, np.nan)}), "not finite"),
    "beyond float32": (lambda reply: arrays(reply, **{"0.bias": np.full(7, 1e300)}), "not finite"),
    "no examples": (with_metrics(loss=1.0), "'num-examples' is None"),
    "half an example": (with_metrics(**{"num-examples": 2.5}), "not a whole number"),
    "all examples": (with_metrics(**{"num-examples": 1 << 60}), "not a whole number"),
    "another record": (with_record, r"unknown records \['more'\]"),
    "entries misshapen": (
        lambda reply: arrays(reply, "extra", centroids=np.zeros((4, 7), np.float32)),
        "unlike those of most",
    ),
    "entries of float64": (lambda reply: arrays(reply, "extra", centroids=np.zeros((3, 7))), "unlike those of most"),
    "entries missing": (lambda reply: arrays(reply, "extra", centroids=None), "unlike those of most"),
    "entries more": (lambda reply: arrays(reply, "extra", more=np.zeros(3)), "unlike those of most"),
    "entries nan": (lambda reply: arrays(reply, "extra", centroids=np.full((3, 7), np.nan)), "not finite"),
    "entries huge": (lambda reply: arrays(reply, "extra", centroids=np.zeros((3, 700))), "bytes beside the model"),
    "entries pickled": (
        lambda reply: arrays(reply, "extra", centroids=Array("float32", (3, 7), "pickle", b"cos\nsystem\n")),
        "serialised as 'pickle'",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_reply_that_cannot_be_used_is_left_out_and_named(kind):
    """The round is one without it."""
    what, words = HOSTILE[kind]
    method = RobustFL(ramp=2, trust=1)
    strategy, result = over(Grid(method, {(NODE, "train"): what}), method, rounds=1, most_extra_bytes=8000)
    assert re.search(words, strategy.reasons[1][NODE])
    report = result.train_metrics_clientapp[1]
    assert (report["method.left_out"], report["method.skipped"]) == ([NODE], 0)
    assert len(report["method.clients"]) == 3
    for key, value in without(3, method).items():
        torch.testing.assert_close(strategy.server[key], value, **CLOSE, msg=key)


def test_a_second_reply_does_not_count():
    twice = lambda reply: [deepcopy(reply), *arrays(reply, **{"0.bias": np.ones(7)})]
    strategy, _ = over(Grid(FedAvg(), {(NODE, "train"): twice}), FedAvg(), rounds=1)
    assert strategy.reasons[1] == {NODE: "a second reply"}
    torch.testing.assert_close(strategy.server["model"], on_one_machine(FedAvg(), 1).server["model"], **CLOSE)


def test_uneven_entries_are_as_many_of_each_name():
    """Clients send as many means as they like, but labels of them all."""
    method = FedCFA(group=4)
    strategy, _ = over(Grid(method), method, rounds=1)
    assert strategy.reasons[1] == {}
    fewer = lambda reply: arrays(reply, "extra", size=reply.content["extra"]["size"].numpy()[:1])
    strategy, _ = over(Grid(method, {(NODE, "train"): fewer}), method, rounds=1)
    assert strategy.reasons[1] == {NODE: "entries unlike those of most clients"}
    for key, value in without(3, method).items():
        torch.testing.assert_close(strategy.server[key], value, **CLOSE, msg=key)


def test_a_survey_waits_for_all_clients():
    """Client 2, which is not in the first cohort, says nothing at first."""
    method = FedNoRo(warmup=1)
    grid = Grid(method, {(986, "query"): "not now"})
    strategy = MethodStrategy(method, NETWORK, SCHEDULE, clients=5, min_available_nodes=4)
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=2)
    assert strategy.reasons == {1: {986: "failed: not now"}, 2: {986: "failed: not now"}}
    assert [result.train_metrics_clientapp[i]["method.skipped"] for i in (1, 2)] == [0, 1]
    assert grid.seen == ["query.client"] * 5 + ["train"] * 4 + ["query.client"] + ["query.survey"] * 4
    grid.hostile, grid.seen = {}, []
    strategy.start(grid, strategy.initial_arrays(), num_rounds=2)
    assert grid.seen == ["query.client", "query.survey"] + ["train"] * 8
    torch.testing.assert_close(strategy.server["model"], on_one_machine(method).server["model"], **CLOSE)


def test_a_nodes_number_is_one_of_its_own():
    def says(number):
        def change(reply):
            if "config" in reply.content.config_records:
                reply.content["config"] = ConfigRecord({"client": number})
            return [reply]

        return change

    for number, words in ((4, "as node 972 does"), (5, "not one of 5"), ("2", "number is '2'"), (1.5, "number is 1.5")):
        strategy, _ = over(Grid(FedAvg(), {(NODE, "query"): says(number)}), FedAvg(), rounds=1)
        assert words in strategy.reasons[1][NODE]
        torch.testing.assert_close(strategy.server["model"], without(3, FedAvg())["model"], **CLOSE)


def test_a_node_that_comes_back_with_another_id_is_asked_again():
    grid = Grid(method := short("joint-optim"))
    strategy, _ = over(grid, method, rounds=1)
    grid.nodes[4242] = grid.nodes.pop(986)
    grid.contexts[4242] = grid.contexts.pop(986)
    strategy.start(grid, strategy.initial_arrays(), num_rounds=2)
    torch.testing.assert_close(strategy.server["model"], on_one_machine(method).server["model"], **CLOSE)


def test_too_few_replies_leave_everything_as_it_was():
    method = short("krum")
    strategy, result = over(Grid(method, {(node, "train"): "gone" for node in (1000, 993, 986)}), method, rounds=1)
    assert result.train_metrics_clientapp[1]["method.skipped"] == 1
    assert torch.equal(strategy.server["model"], found(method, NETWORK, holdings(), SCHEDULE).server["model"])
    assert strategy.round == 1


def test_entries_that_all_clients_leave_out():
    method = RobustFL(ramp=2, trust=1)
    grid = Grid(method)
    grid.hostile = {(node, "train"): lambda reply: arrays(reply, "extra", centroids=None) for node in grid.nodes}
    _, result = over(grid, method, rounds=1)
    assert result.train_metrics_clientapp[1]["method.skipped"] == 1
    grid = Grid(method := FedNoRo(warmup=1))
    grid.hostile = {(node, "query"): no_losses for node in grid.nodes}
    strategy, result = over(grid, method, rounds=2)
    assert [result.train_metrics_clientapp[i]["method.skipped"] for i in (1, 2)] == [0, 1]
    assert strategy.round == 1


def no_losses(reply):
    return arrays(reply, "extra", losses=None) if reply.content.array_records else [reply]


def test_what_a_client_refuses():
    grid = Grid(FedAvg())
    strategy = MethodStrategy(FedAvg(), NETWORK, SCHEDULE, clients=5)
    ask = lambda content: next(grid._run(Message(RecordDict(content), message_type="train", dst_node_id=1000)))
    config = {"config": ConfigRecord({"server-round": 1})}
    assert "'server-round', an integer from 1 on" in ask({"arrays": strategy.initial_arrays()}).error.reason
    assert "missing arrays" in ask({**config, "arrays": ArrayRecord()}).error.reason
    more = {**config, "arrays": strategy.initial_arrays(), "more": ArrayRecord()}
    assert "unknown records" in ask(more).error.reason
    grid.nodes[1000] = 9
    message = Message(RecordDict(config), message_type="train", dst_node_id=1000)
    for given, words in (({}, "no partition-id"), ({"partition-id": "3"}, "got '3'")):
        app = client_app(FedAvg(), NETWORK, SCHEDULE, data=lambda context: (holdings().x, holdings().y))
        message.content["arrays"] = strategy.initial_arrays()
        with pytest.raises(ValueError, match=words):
            app(message, Context(1, 1000, given, RecordDict(), {}))
    for x, y in ((torch.zeros(2, 6), torch.zeros(3).long()), (torch.zeros(2, 6), torch.zeros(2))):
        app = client_app(FedAvg(), NETWORK, SCHEDULE, data=lambda context, x=x, y=y: (x, y))
        with pytest.raises(ValueError, match="a client's data are"):
            app(message, Context(1, 1000, {"partition-id": 0}, RecordDict(), {}))


@pytest.mark.parametrize("module", ["method_app", "method_strategy", "fused_grid"])
def test_the_extra_is_named_where_flower_is_missing(module):
    code = f"import sys; sys.modules['flwr'] = None; import anabranch.integrations.flower.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "need flwr>=1.40: pip install 'anabranch[flower]'" in done.stderr


# Two networks; a survey, labels that are kept and all models at once; what is sent beside the model.
SIMULATED = {
    "fedavg": FedAvg(),
    "co-teaching": CoTeaching(ramp=2),
    "maskedoptim": MaskedOptim(warmup=1),
    "robustfl": RobustFL(ramp=2, trust=1),
}
MOST = 190  # samples of a client


def simulated_app(network, schedule, holdings):
    """Clients of several methods in one: a message's config names the method, or else is of a secure sum.

    It stands inside, so that Ray's workers get it whole: they cannot import tests.
    """
    from flwr.clientapp import ClientApp

    from anabranch.integrations.flower.secure_mod import SecureMod

    def samples(context):
        mine = holdings.owned[context.node_config["partition-id"]]
        return holdings.x[mine], holdings.y[mine]

    apps = {name: client_app(method, network, schedule, data=samples) for name, method in SIMULATED.items()}
    mods = [SecureMod(privacy=2, most_weight=MOST)]
    secure = client_app(SIMULATED["co-teaching"], network, schedule, data=samples, mods=mods)
    app = ClientApp()

    def answer(message, context):
        if "anabranch.secure" in message.content.config_records:
            return secure(message, context)
        return apps[message.content["config"]["method"]](message, context)

    app.train()(answer)
    app.query("survey")(answer)
    app.query("client")(apps["fedavg"])
    return app


@pytest.mark.slow
def test_rounds_in_a_simulation_are_those_of_one_machine(simulate):
    """Under MethodStrategy, under Flower's own FedAvg, and as secure sums."""
    from flwr.serverapp import ServerApp
    from sklearn.datasets import load_digits

    from anabranch.integrations.flower.secure_strategy import SecureFedAvg, SecureSum

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels[:500]).float() / 16, torch.from_numpy(labels[:500])
    y[::7] = 9 - y[::7]
    held = Holdings(x, y, torch.arange(500).split([40, 90, 120, 60, MOST]))
    network, schedule = MLP((64, 16, 10)), Schedule(rounds=2, epochs=1)
    server, models, reports = ServerApp(), {}, {}
    all_nodes = {"min_train_nodes": 5, "min_available_nodes": 5, "fraction_evaluate": 0.0}

    @server.main()
    def main(grid, context):
        first = {}
        for name, method in SIMULATED.items():
            strategy = MethodStrategy(method, network, schedule, clients=5)
            config, first[name] = ConfigRecord({"method": name}), strategy.initial_arrays()
            strategy.start(grid, first[name], num_rounds=2, timeout=120, train_config=config)
            assert not any(strategy.reasons.values())
            models[name] = strategy.server["model"]
        sums = SecureSum(privacy=2, most_weight=MOST)
        for flowers, name, config in (
            (FlowersFedAvg(**all_nodes), "fedavg", ConfigRecord({"method": "fedavg"})),
            (SecureFedAvg(sums, **all_nodes), "co-teaching", None),
        ):
            result = flowers.start(grid, first[name], num_rounds=2, timeout=120, train_config=config)
            named = {key: torch.from_numpy(array.numpy()) for key, array in result.arrays.items()}
            models[f"{name}, {type(flowers).__name__}"] = network.layout.model(named)
            reports[name] = result.train_metrics_clientapp[2]

    simulate(server, simulated_app(network, schedule, held), nodes=5)
    assert len(models) == 6
    assert sorted(reports["co-teaching"]["secure.weights"]) == sorted(map(len, held.owned))
    assert reports["co-teaching"]["secure.clipped"] == 0
    for name, model in models.items():
        federation = found(SIMULATED[name.partition(",")[0]], network, held, schedule)
        for _ in range(2):
            run_round(federation)
        assert (federation.server["model"] - model).abs().max() < 1e-5, name
