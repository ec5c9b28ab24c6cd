"""Rounds over a grid in this process, whose nodes forget everything but context.state; and over Flower's simulation."""

from fractions import Fraction
from itertools import product
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("flwr.app", reason="needs the extra `flower`")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import serde

from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.resumable import ResumableClient
from anabranch.integrations.flower import secure_mod
from anabranch.integrations.flower.secure_mod import KEY, SecureMod
from anabranch.integrations.flower.secure_strategy import SecureFedAvg, SecureSum

NODES = [11, 2**63 + 5, 33, 44, 55, 66, 77, 88]  # the second is the last by id
BY_ID = sorted(NODES)
STEPS = ["train", "hello", "share", "check", "agree", "sum", "project", "accept"]
START = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5, 0.25], np.float32),
    "seen": np.array(3),
}


def update_of(node, turn=1):
    """Two numbers beyond the clip of 1."""
    random = np.random.default_rng([node % 1000, turn])
    return {
        "w": random.normal(0, 0.3, (2, 3)).astype(np.float32),
        "b": np.array([1.5 if node == 33 else 0.1, -2.0 if node == 44 else 0.2], np.float32),
        "seen": np.array(10),
    }


def app_of(mods, trained=update_of):
    app = ClientApp(mods=mods)

    @app.train()
    def fit(message, context):
        assert KEY not in message.content  # the user's function sees what it always sees
        arrays, config = message.content["arrays"], message.content["config"]
        update = trained(context.node_id, config["server-round"])
        moved = {name: np.asarray(array.numpy() + update[name]) for name, array in arrays.items()}
        moved = {name: array.astype(arrays[name].numpy().dtype) for name, array in moved.items()}
        record = ArrayRecord({name: Array(array) for name, array in moved.items()})
        metrics = MetricRecord({"num-examples": context.node_id % 10 + 1, "loss": float(context.node_id % 10)})
        content = {"arrays": record, "metrics": metrics, "more": ConfigRecord({"secret": 7})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def measure(message, context):
        loss = float(message.content["arrays"]["b"].numpy().sum())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": loss})}), reply_to=message)

    return app


class WrongSum(ResumableClient):
    def _sum(self, now, quorum):
        row = self._rows[now.view.accepted[0]]
        row[0] = (row[0] + 1) % 1000
        return super()._sum(now, quorum)


class Grid:
    """Runs each message in an app of its own; what crosses it, contexts too, has been through Flower's wire format.

    hostile  (node, step) -> what to do: "fail", "silent", "garbage", "other", "liar"
    """

    def __init__(self, mods=None, hostile=None, trained=update_of):
        self.mods = mods or (lambda node: [SecureMod()])
        self.hostile, self.trained = hostile or {}, trained
        self.contexts = {node: serde.context_to_proto(Context(1, node, {}, RecordDict(), {})) for node in NODES}
        self.up, self.steps = [], dict.fromkeys(NODES, 0)

    def get_node_ids(self):
        return NODES

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            reply = self._run(message)
            if reply is not None:
                self.up.append(reply)
                yield reply

    def _run(self, sent):
        node = sent.metadata.dst_node_id
        message = serde.message_from_proto(serde.message_to_proto(sent))
        message.metadata.__dict__["_message_id"] = "m"
        if sent.metadata.message_type == "train":
            record = message.content[KEY]
            self.steps[node] = 0 if record["step"] == "train" else self.steps[node] + 1
        step = STEPS[self.steps[node]] if sent.metadata.message_type == "train" else "evaluate"
        what = self.hostile.get((node, step)) or self.hostile.get((node, "always"))
        if what == "silent":
            return None
        context = serde.context_from_proto(self.contexts[node])
        client = WrongSum if what == "liar" else ResumableClient
        try:
            if what == "fail":
                raise RuntimeError("out of memory")
            with mock.patch.object(secure_mod, "ResumableClient", client):
                reply = app_of(self.mods(node), self.trained)(message, context)
        except Exception as error:
            return Message(Error(1, str(error)), reply_to=message)
        self.contexts[node] = serde.context_to_proto(context)
        if what == "garbage":
            reply.content[KEY]["message"] = b"\xff" * 300
        if what == "other":
            reply.content = RecordDict({"metrics": MetricRecord({"loss": 0.0})})
        return serde.message_from_proto(serde.message_to_proto(reply))


def record(arrays):
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def plain_mean(nodes, settings, turn=1, start=START, trained=update_of, weights=None):
    """Arrays after the mean of clipped and rounded updates, by Python's integers."""
    scale = 1 << settings.fraction_bits
    weights = weights or dict.fromkeys(nodes, 1)
    moved = {"seen": start["seen"]} if "seen" in start else {}
    for name in ("w", "b"):
        rows = {n: (start[name] + trained(n, turn)[name]).astype(np.float32) - start[name] for n in nodes}
        flat = {n: [float(x) for x in np.clip(row, -settings.clip, settings.clip).ravel()] for n, row in rows.items()}
        total = [sum(weights[n] * round(Fraction(flat[n][i]) * scale) for n in nodes) for i in range(start[name].size)]
        mean = np.array([t / (sum(weights.values()) * scale) for t in total]).reshape(start[name].shape)
        moved[name] = (start[name].astype(np.float64) + mean).astype(np.float32)
    return moved


def run(grid, settings, rounds=1, **more):
    strategy = SecureFedAvg(settings, fraction_evaluate=0.5, **more)
    result = strategy.start(grid, record(START), num_rounds=rounds)
    return strategy, result


def same(arrays, wanted):
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name].numpy(), array, strict=True)


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """Flower makes messages only where it knows which run it is in."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


SIZES = SecureSum(blocks=2, privacy=2, errors=1, dropouts=1)


@pytest.mark.parametrize("mode", ["direct", "mask"])
@pytest.mark.parametrize("proof", ["V0", "V1", "V2"])
def test_the_mean_is_that_of_the_integers(mode, proof):
    settings = SecureSum(blocks=2, privacy=2, errors=1, dropouts=1, mode=mode, proof=proof)
    key = {"group_key": b"g" * 32} if proof == "V1" else {}
    grid = Grid(lambda node: [SecureMod(privacy=2, proof=proof, **key)])
    strategy, result = run(grid, settings, rounds=2)
    first = plain_mean(NODES, settings)
    beyond = sum(int((np.abs(update_of(n, 1)[name]) > 1).sum()) for n in NODES for name in ("w", "b"))
    assert beyond == result.train_metrics_clientapp[1]["secure.clipped"] > 1
    same(result.arrays, plain_mean(NODES, settings, 2, first))
    for turn in (1, 2):
        report = dict(result.train_metrics_clientapp[turn])
        assert report["secure.nodes"] == BY_ID
        assert report["secure.weights"] == [1] * 8
        assert report["secure.proof"] == int(proof[1])
        assert all(report[f"secure.{kind}"] == [] for kind in ("excluded", "wrong", "left_out", "failed"))
        assert report["secure.skipped"] == 0
        loss = np.average([n % 10 for n in NODES], weights=[n % 10 + 1 for n in NODES])
        assert report["loss"] == pytest.approx(loss)
    assert strategy.reasons == {1: {}, 2: {}}
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(first["b"].sum())


def test_no_array_leaves_a_node_and_nothing_stays_behind():
    grid = Grid()
    run(grid, SIZES)
    up = [reply for reply in grid.up if reply.metadata.message_type == "train"]
    assert len(up) == 8 * len(STEPS)
    for reply in up:
        assert not reply.content.array_records
        assert set(reply.content.config_records) == {KEY}
    clear = [update_of(node)["w"].tobytes() for node in NODES]
    for reply in up:
        whole = serde.message_to_proto(reply).SerializeToString()
        assert not any(row[:8] in whole for row in clear)
    for proto in grid.contexts.values():
        assert set(serde.context_from_proto(proto).state[KEY]) == {"identity"}


@pytest.mark.parametrize(
    ("what", "step"),
    [*product(["fail", "silent"], STEPS), *product(["garbage", "other"], ["train", "share", "sum", "accept"])],
)
def test_a_node_that_fails_at_any_step(step, what):
    """Until the set is agreed on it is not in the sum, or it is; the others go on, and the round says what happened."""
    grid = Grid(hostile={(77, step): what})
    rounds = 2 if what == "fail" else 1
    strategy, result = run(grid, SIZES, rounds)
    report = result.train_metrics_clientapp[1]
    without = [n for n in NODES if n != 77]
    if (what, step) in {("garbage", "train"), ("garbage", "accept"), ("other", "train")}:
        wanted = without if what == "other" else NODES  # training's and the last reply carry no message
    else:
        wanted = without if STEPS.index(step) < STEPS.index("check") else NODES
    assert report["secure.nodes"] == sorted(wanted)
    arrays = START
    for turn in range(1, rounds + 1):
        arrays = plain_mean(wanted, SIZES, turn, arrays)
    same(result.arrays, arrays)
    excluded = 77 not in wanted and step != "train"
    assert report["secure.excluded"] == ([77] if excluded else [])
    if step == "train":
        kinds = {"fail": ([], [77]), "silent": ([], []), "garbage": ([], []), "other": ([77], [])}[what]
        assert (report["secure.left_out"], report["secure.failed"]) == kinds
    elif (what, step) != ("garbage", "accept"):
        assert report["secure.failed"] == [77]
        words = {"fail": "out of memory", "silent": "did not answer", "garbage": "malformed", "other": "something else"}
        assert words[what] in strategy.reasons[1][77]


def test_a_node_that_adds_up_wrong_shares_is_named():
    strategy, result = run(Grid(hostile={(55, "always"): "liar", (66, "sum"): "silent"}), SIZES)
    report = result.train_metrics_clientapp[1]
    assert (report["secure.wrong"], report["secure.failed"]) == ([55], [66])
    assert report["secure.nodes"] == BY_ID
    same(result.arrays, plain_mean(NODES, SIZES))
    assert "wrong" in strategy.reasons[1][55]


def test_too_many_silent_nodes_leave_the_arrays():
    hostile = {(node, "sum"): "silent" for node in NODES[:4]}
    _, result = run(Grid(hostile=hostile), SIZES)
    report = result.train_metrics_clientapp[1]
    assert report["secure.skipped"] == 1
    assert report["secure.failed"] == sorted(NODES[:4])
    assert "secure.nodes" not in report
    _, result = run(Grid(hostile={(node, "train"): "silent" for node in NODES[:6]}), SIZES)
    assert result.train_metrics_clientapp[1]["secure.skipped"] == 1


def test_weights_are_scaled_numbers_of_examples():
    settings = SecureSum(privacy=2, most_weight=5, clip=1.0, fraction_bits=16)
    _, result = run(Grid(lambda node: [SecureMod(most_weight=5)]), settings)
    examples = {n: n % 10 + 1 for n in NODES}
    weights = {n: max(1, round(5 * x / max(examples.values()))) for n, x in examples.items()}
    assert result.train_metrics_clientapp[1]["secure.weights"] == [weights[n] for n in BY_ID]
    same(result.arrays, plain_mean(NODES, settings, weights=weights))


@pytest.mark.parametrize(
    ("mod", "settings", "words"),
    [
        ({"privacy": 3}, {}, "T = 2; here 3 is the least"),
        ({"proof": "V0"}, {}, "has proof V2; here V0"),
        ({"known": frozenset([bytes(32)])}, {}, "nodes that are not known here"),
        ({}, {"most_weight": 5, "fraction_bits": 16}, "weights up to 5; here 1 is the most"),
    ],
)
def test_a_node_refuses_what_asks_for_more_trust(mod, settings, words):
    """And sends nothing but its key."""
    grid = Grid(lambda node: [SecureMod(**mod)] if node == 77 else [SecureMod(most_weight=5)])
    strategy, result = run(grid, SecureSum(**{"blocks": 2, "privacy": 2, "errors": 1, "dropouts": 1, **settings}))
    assert words in strategy.reasons[1][77]
    assert 77 not in result.train_metrics_clientapp[1]["secure.nodes"]


def test_keys_that_are_known_before():
    secret = {node: bytes([i]) * 32 for i, node in enumerate(NODES)}
    keys = {node: Identity(each).public for node, each in secret.items()}
    known = frozenset(keys.values())
    secret[66] = b"?" * 32  # another key than the one known
    grid = Grid(lambda node: [SecureMod(known=known, identity=lambda context: secret[context.node_id])])
    strategy, result = run(grid, SIZES, keys=keys)
    assert "key is not the one known" in strategy.reasons[1][66]
    assert result.train_metrics_clientapp[1]["secure.left_out"] == [66]
    same(result.arrays, plain_mean([n for n in NODES if n != 66], SIZES))


def test_a_key_that_changes_or_is_borrowed_is_refused():
    secret = {node: bytes([i]) * 32 for i, node in enumerate(NODES)} | {77: bytes(32)}  # that of node 11
    grid = Grid(lambda node: [SecureMod(identity=lambda context: secret[context.node_id])])
    strategy, _ = run(grid, SIZES)
    assert "another node's key" in strategy.reasons[1][77]
    secret[66] = b"?" * 32
    grid.contexts[66] = serde.context_to_proto(Context(1, 66, {}, RecordDict(), {}))
    strategy.start(grid, record(START), num_rounds=1)
    assert "not the one known" in strategy.reasons[1][66]


def ask(grid, node, content):
    message = Message(RecordDict(content), message_type="train", dst_node_id=node)
    grid.steps[node] = -1
    return grid._run(message)


def test_plain_training_is_refused():
    grid, context = Grid(), Context(1, 11, {}, RecordDict(), {})
    content = RecordDict({"arrays": record(START), "config": ConfigRecord({"server-round": 1})})
    message = Message(content, message_type="train", dst_node_id=11)
    with pytest.raises(ValueError, match="trains for secure sums only"):
        app_of([SecureMod()])(message, context)
    assert not grid.up


def test_one_update_goes_into_one_session():
    """A second sum over the same update, without one node, would tell that node's by difference."""
    grid = Grid(hostile={(node, "sum"): "silent" for node in NODES[:3]})
    strategy, _ = run(grid, SIZES)
    keys = sorted(strategy._known.values())
    again = SIZES.parameters(keys, strategy._identity.public, length=8, weights=(1,) * 8)
    hello = {KEY: ConfigRecord({"step": "hello", "parameters": again.encode()})}
    reply = ask(grid, 11, hello)
    assert "without an update of its own" in reply.error.reason
    strategy.start(grid, record(START), num_rounds=1)
    assert ask(grid, 11, {KEY: ConfigRecord({"step": "reveal"})}).error.reason.startswith("step must be one of")


@pytest.mark.parametrize("step", ["hello", "share", "receive"])
def test_a_state_that_comes_back_does_not_answer_again(step, tmp_path):
    """After a `hello` that came twice one update would be in two sums; after others, nonces would be used again."""
    grid = Grid(lambda node: [SecureMod(once=tmp_path / str(node))])
    kept = {}
    send = grid.send_and_receive

    def watched(messages, *, timeout=None):
        for message in (messages := list(messages)):
            if message.metadata.dst_node_id == 11 and message.content.config_records.get(KEY, {}).get("step") == step:
                kept.setdefault("all", (grid.contexts[11], message))
        return list(send(messages, timeout=timeout))

    grid.send_and_receive = watched
    _, result = run(grid, SIZES)
    assert result.train_metrics_clientapp[1]["secure.nodes"] == BY_ID
    grid.contexts[11], message = kept["all"]
    grid.steps[11] = 1
    assert "answered from this state before" in grid._run(message).error.reason


def test_what_a_server_cannot_ask_for():
    grid = Grid()
    give = lambda **record: ask(grid, 11, {KEY: ConfigRecord(record)}).error.reason
    assert "is in no session" in give(step="receive", message=b"x")
    content = {"arrays": record(START), "config": ConfigRecord({"server-round": 1})}
    trained = {KEY: ConfigRecord({"step": "train", "weighted_by": "num-examples"})}
    assert not ask(grid, 11, content | trained).has_error()
    assert "gave no parameters of type bytes" in give(step="hello")
    assert "no parameters" in give(step="hello", parameters=b"x")
    key = serde.context_from_proto(grid.contexts[11]).state[KEY]["identity"]
    others = [Identity().public for _ in range(7)]
    made = lambda own, length: SIZES.parameters([own, *others], bytes(32), length=length, weights=(1,) * 8).encode()
    assert "vectors of 9, unlike" in give(step="hello", parameters=made(Identity(key).public, 9))
    assert "another key of this node" in give(step="hello", parameters=made(Identity().public, 8))
    assert not ask(
        grid, 11, {KEY: ConfigRecord({"step": "hello", "parameters": made(Identity(key).public, 8)})}
    ).has_error()
    assert "gave no message of type bytes" in give(step="share", round=1)
    assert "malformed" in give(step="share", round=1, message=b"x")
    assert "one ArrayRecord is wanted, not 0" in ask(grid, 11, trained).error.reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy": 0}, "need K, T >= 1"),
        ({"field": "m13"}, "unknown field 'm13'"),
        ({"most_weight": 0}, "most_weight >= 1"),
        ({"step_timeout_s": 0.0}, "step_timeout_s > 0"),
        ({"clip": 600.0}, "at most a weight of"),
        ({"proof": "V3"}, "proof one of"),
    ],
)
def test_settings_that_cannot_hold(settings, words):
    with pytest.raises(ValueError, match=words):
        SecureSum(**settings)


def test_too_few_nodes_are_named():
    assert SIZES.least_clients == 7
    with pytest.raises(ValueError, match=r"min_train_nodes must be at least 7 .*got 6"):
        SecureFedAvg(SIZES, min_train_nodes=6)


def simulated_app(descend):
    """Eight nodes with digits; the fourth fails to add up, the sixth adds up a wrong share."""

    def trained(arrays, partition):
        arrays, examples = descend(arrays, partition)
        return {name: array.astype(np.float32) for name, array in arrays.items()}, examples

    def hostile(message, context, call_next):
        from unittest import mock

        from anabranch.aggregate.secure.resumable import ResumableClient
        from anabranch.integrations.flower import secure_mod

        class Hostile(ResumableClient):
            def _sum(self, now, quorum):
                if context.node_config["partition-id"] == 3:
                    raise RuntimeError("out of memory")
                if context.node_config["partition-id"] == 5:
                    row = self._rows[now.view.accepted[0]]
                    row[0] = (row[0] + 1) % 1000
                return super()._sum(now, quorum)

        with mock.patch.object(secure_mod, "ResumableClient", Hostile):
            return call_next(message, context)

    app = ClientApp(mods=[hostile, SecureMod(privacy=2)])

    @app.train()
    def fit(message, context):
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

        sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
        arrays, examples = trained(sent, context.node_config["partition-id"])
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        metrics = MetricRecord({"num-examples": examples})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app, trained


@pytest.mark.slow
def test_rounds_in_a_simulation_are_those_of_the_integers(descend, simulate):
    from flwr.serverapp import ServerApp

    app, trained = simulated_app(descend)
    start = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
    server, results = ServerApp(), {}

    @server.main()
    def main(grid, context):
        strategy = SecureFedAvg(SIZES, min_train_nodes=8, min_available_nodes=8, fraction_evaluate=0.0)
        results["round"] = strategy.start(grid, record(start), num_rounds=2, timeout=120), strategy.reasons

    simulate(server, app)
    result, reasons = results["round"]
    wanted = start
    for turn in (1, 2):
        before = wanted
        updates = [trained(before, i)[0] for i in range(8)]
        change = lambda n, turn, u=updates, s=before: {name: u[n][name] - s[name] for name in s}
        wanted = plain_mean(range(8), SIZES, turn, before, change)
        report = result.train_metrics_clientapp[turn]
        assert [len(report[f"secure.{kind}"]) for kind in ("nodes", "excluded", "wrong", "failed")] == [8, 0, 1, 1]
        assert "out of memory" in reasons[turn][report["secure.failed"][0]]
    assert np.abs(wanted["w"]).max() > 0.01
    same(result.arrays, wanted)
