"""Replies made by hand: every rule, in any order, beside whatever hostile nodes send."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from anabranch.aggregate import mixes, robust, rules
from anabranch.aggregate.settings import BY_COORDINATE, MIXES, RULES, AggregateMethod

app = pytest.importorskip("flwr.app", reason="needs the extra `flower`")

from anabranch.integrations.flower.strategy import RobustFedAvg  # noqa: E402

SENT = {
    "weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
    "bias": np.array([0.5, 1.5], np.float32),
    "seen": np.array(40),
}
NODES = [2**63 + 11, 5, 7000, 123456789, 42, 99, 2**40, 8]
OPTIONS = {"f": 1, "radius": 1.0, "step": 0.05, "own": 0, "root": 0, "bucket": 2, "seed": 5, "clip": 0.9}


def record(arrays):
    return app.ArrayRecord({name: app.Array(array) for name, array in arrays.items()})


def arrays_of(record):
    return {name: array.numpy() for name, array in record.items()}


def flat(arrays):
    return torch.from_numpy(np.concatenate([arrays[name].ravel() for name in ("weight", "bias")])).double()


def trained(seed, *, scale=0.3, shift=0.2):
    random = np.random.default_rng(seed)
    arrays = {
        name: (array + shift + scale * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in SENT.items()
    }
    return arrays | {"seen": np.array(40 + seed)}


def root(server_round, arrays):
    assert server_round == 3
    return record({name: np.asarray(array + 1) for name, array in arrays_of(arrays).items()})


def method(rule="geometric-median", *pre, **options):
    """With the options of OPTIONS that it takes."""
    taken = {*RULES[rule], *(option for name in pre for option in MIXES[name])}
    given = {name: value for name, value in OPTIONS.items() if name in taken}
    return AggregateMethod(rule=rule, pre=pre, **(given | options))


def strategy(rule="geometric-median", *pre, per_tensor=False, weighted=None, **options):
    made = RobustFedAvg(
        method(rule, *pre, **options), per_tensor=per_tensor, root=root if rule in robust.ROOTED else None,
        weighted=rule == "mean" if weighted is None else weighted,
    )  # fmt: skip
    made._sent = record(SENT)
    return made


@pytest.fixture
def replies(reply):
    return [reply(node, trained(i), loss=float(i), examples=i + 1) for i, node in enumerate(NODES)]


def by_hand(rule, gram):
    """Coefficients of eight updates, for f = 1."""
    N, pad = len(gram), torch.nn.functional.pad
    match rule:
        case "mean":  # the nodes' own numbers of examples, in the order of their ids
            return torch.arange(1.0, 9.0, dtype=torch.float64)[np.argsort(NODES)] / 36
        case "geometric-median":
            return rules.geometric_median(gram)
        case "medoid":
            return rules.medoid(gram)
        case "centred-clipping":
            return rules.centred_clipping(pad(gram, (0, 1, 0, 1)), N, 1.0)[:N]
        case "foolsgold":
            return rules.foolsgold(gram) / N
        case "fltrust":
            return rules.fltrust(gram, 0)
        case "nearest-neighbours":
            return rules.nearest_neighbours_of(gram, 1, 0)
    return getattr(rules, rule.replace("-", "_"))(gram, 1)


@pytest.mark.parametrize("rule", sorted(set(RULES) - BY_COORDINATE - {"bulyan"}))
def test_every_rule_of_distances_acts_on_updates_in_the_order_of_nodes(rule, replies):
    arrays, metrics = strategy(rule).aggregate_train(3, replies)
    order = np.argsort(NODES)
    rows = torch.stack([flat(trained(i)) for i in order]) - flat(SENT)
    points = torch.cat([torch.ones(1, rows.shape[1]).double(), rows]) if rule in robust.ROOTED else rows
    a = by_hand(rule, points @ points.T)
    assert metrics["robust.nodes"] == sorted(NODES)
    assert_close(torch.tensor(metrics["robust.coefficients"]).double(), a[-8:], atol=1e-5, rtol=1e-5)  # float32 rows
    assert_close(flat(arrays_of(arrays)), flat(SENT) + a @ points, atol=2e-6, rtol=2e-6)
    assert arrays["seen"].numpy() == 43  # the lower one of the two middle ones
    assert list(arrays) == list(SENT)


def middle_mean(values, centre, kept):
    """Mean of the `kept` numbers of each column nearest to its centre."""
    nearest = (values - centre).abs().argsort(stable=True, dim=0)[:kept]
    return values.gather(0, nearest).mean(0)


@pytest.mark.parametrize("rule", sorted({*BY_COORDINATE, "bulyan"}))
def test_every_rule_of_coordinates_acts_on_updates(rule, replies):
    arrays, metrics = strategy(rule).aggregate_train(3, replies)
    rows = torch.stack([flat(trained(i)) for i in np.argsort(NODES)]) - flat(SENT)
    ordered = rows.sort(0).values
    wanted = {
        "coordinate-median": ordered[3:5].mean(0),
        "lower-median": ordered[3],
        "trimmed-mean": ordered[1:7].mean(0),
        "mean-around-median": middle_mean(ordered, ordered[3:5].mean(0), 7),
        "phocas": middle_mean(ordered, ordered[1:7].mean(0), 7),
        "sign-majority": 0.05 * rows.sign().sum(0).sign(),
        "bulyan": selected_mean(rows),
    }[rule]
    assert_close(flat(arrays_of(arrays)), flat(SENT) + wanted, atol=1e-6, rtol=1e-6)
    assert "robust.coefficients" not in metrics
    assert metrics["robust.nodes"] == sorted(NODES)


def selected_mean(rows):
    """Bulyan for f = 1: six rows by Krum, then the mean of the four numbers of each column nearest to their median."""
    chosen = rows[rules.bulyan_selection(rows @ rows.T, 1) > 0].sort(0).values
    return middle_mean(chosen, chosen[2:4].mean(0), 4)


@pytest.mark.parametrize("step", MIXES)
def test_every_step_before_a_rule(step, replies):
    arrays, _ = strategy("geometric-median", step).aggregate_train(3, replies)
    rows = torch.stack([flat(trained(i)) for i in np.argsort(NODES)]) - flat(SENT)
    draws = torch.Generator().manual_seed((5 * 0x9E3779B1 + 3) % 2**32)
    how = {
        "nnm": partial(mixes.nearest_neighbour_mixing, f=1),
        "bucketing": partial(mixes.bucketing, size=2, generator=draws),
        "static-clipping": partial(mixes.static_clipping, radius=0.9),
        "adaptive-clipping": partial(mixes.adaptive_clipping, f=1),
    }[step]
    a = rules.after(how, rules.geometric_median)(rows @ rows.T)
    assert_close(flat(arrays_of(arrays)), flat(SENT) + a @ rows, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_who_answers_first_changes_no_bit(rule, per_tensor, replies):
    seen = set()
    for turn in range(4):
        arrays, metrics = strategy(rule, per_tensor=per_tensor).aggregate_train(3, replies[turn:] + replies[:turn])
        seen.add((*(array.data for array in arrays.values()), repr(dict(metrics))))
    assert len(seen) == 1


def test_each_tensor_alone(replies):
    arrays, metrics = strategy("krum", per_tensor=True).aggregate_train(3, replies)
    order = np.argsort(NODES)
    for name in ("weight", "bias"):
        rows = torch.stack([torch.from_numpy(trained(i)[name] - SENT[name]).double().ravel() for i in order])
        a = rules.krum(rows @ rows.T, 1)
        assert metrics[f"robust.coefficients.{name}"] == a.tolist()
        wanted = SENT[name] + (a @ rows).numpy().reshape(SENT[name].shape)
        np.testing.assert_allclose(arrays[name].numpy(), wanted, rtol=1e-6, atol=1e-6)


def bad_arrays():
    good = trained(0)
    nan, inf = trained(0), trained(0)
    nan["bias"][0], inf["weight"][1, 1] = np.nan, -np.inf
    return {
        "nan": (nan, "not finite"),
        "inf": (inf, "not finite"),
        "missing": ({name: good[name] for name in ("weight", "seen")}, r"missing arrays \['bias'\]"),
        "more": ({**good, "extra": good["bias"]}, r"unknown arrays \['extra'\]"),
        "misshapen": ({**good, "bias": good["weight"]}, "array 'bias': float32"),
        "no arrays": (None, "wanted, not 0 and 1"),
        "counter": ({**good, "seen": np.array(0.5)}, "array 'seen': float64"),
    }


@pytest.mark.parametrize("kind", bad_arrays())
def test_unusable_replies_are_left_out_and_named(kind, replies, reply, caplog):
    sent, words = bad_arrays()[kind]
    replies[0] = reply(NODES[0], sent, loss=1e9)
    replies[1] = reply(NODES[1], error="out of memory")
    with caplog.at_level("WARNING", logger="flwr"):
        _, metrics = strategy("krum", f=2).aggregate_train(3, replies)
    assert re.search(f"Left out node {NODES[0]}: .*{words}", caplog.text)
    assert (metrics["robust.left_out"], metrics["robust.failed"]) == ([NODES[0]], [NODES[1]])
    assert metrics["robust.nodes"] == sorted(NODES[2:])
    assert metrics["robust.skipped"] == 0
    assert metrics["loss"] == pytest.approx(np.average(range(2, 8), weights=range(3, 9)))
    # One of the two has shown itself, one is still among the six.
    rows = torch.stack([flat(trained(NODES.index(node))) for node in sorted(NODES[2:])]) - flat(SENT)
    assert metrics["robust.coefficients"] == rules.krum(rows @ rows.T, 1).tolist()


@pytest.mark.parametrize("examples", [0, -1, float("nan"), float("inf"), [1, 2]])
def test_numbers_of_examples_are_checked(examples, replies, reply):
    replies[0] = reply(NODES[0], trained(0), examples=examples)
    _, metrics = strategy("mean").aggregate_train(3, replies)
    assert metrics["robust.left_out"] == [NODES[0]]


def test_a_second_reply_does_not_count(replies, reply):
    _, metrics = strategy().aggregate_train(3, [*replies, reply(NODES[2], trained(9))])
    assert metrics["robust.left_out"] == [NODES[2]]
    assert metrics["robust.nodes"] == sorted(NODES)


@pytest.mark.parametrize(
    "metrics", [{"loss": float("nan")}, {"loss": [1.0, 2.0]}, {}, {"loss": 1.0, "robust.gap_rel": 7.0}]
)
def test_odd_metrics_are_left_out_of_their_average(metrics, replies, reply):
    replies[3] = reply(NODES[3], trained(3), examples=4, **metrics)
    _, got = strategy().aggregate_train(3, replies)
    rest = [0, 1, 2, 4, 5, 6, 7]
    assert got["loss"] == pytest.approx(np.average(rest, weights=[i + 1 for i in rest]))
    assert got["robust.nodes"] == sorted(NODES)  # the update itself is usable
    assert got["robust.gap_rel"] <= 1e-6
    assert strategy().aggregate_evaluate(3, replies)["loss"] == got["loss"]


def test_evaluation_survives_whatever_comes(replies, reply):
    replies[1] = reply(NODES[1], error="killed")
    replies[2] = reply(NODES[2], trained(2), examples=[3], loss=0.0)
    replies[3].content["second"] = app.MetricRecord({"loss": 0.0})
    got = strategy().aggregate_evaluate(3, replies)
    assert got["loss"] == pytest.approx(np.average([0, 4, 5, 6, 7], weights=[1, 5, 6, 7, 8]))
    assert strategy().aggregate_evaluate(3, replies[1:4]) is None
    assert strategy().aggregate_evaluate(3, []) is None


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("mean", "foolsgold", "sign-majority")])
@pytest.mark.parametrize("value", [1e30, 3e37, -1e4])
def test_a_hostile_node_moves_little(rule, value, replies, reply):
    honest = torch.stack([flat(trained(i)) for i in range(1, 8)])
    replies[0] = reply(NODES[0], {**SENT, "weight": np.full((4, 3), value, np.float32)})
    arrays, metrics = strategy(rule).aggregate_train(3, replies)
    reach = max(1.0, (honest - honest.mean(0)).norm(dim=1).max().item())  # 1: the radius of clipping
    assert (flat(arrays_of(arrays)) - honest.mean(0)).norm() < 2 * reach
    assert NODES[0] in metrics["robust.outliers"]
    moved, _ = strategy("mean", weighted=False).aggregate_train(3, replies)
    assert (flat(arrays_of(moved)) - honest.mean(0)).norm() > 100 * reach


def test_equal_replies_are_no_outliers(reply):
    _, metrics = strategy().aggregate_train(3, [reply(node, trained(1)) for node in NODES])
    assert metrics["robust.outliers"] == []


def test_foolsgold_remembers(reply):
    made = strategy("foolsgold")
    for turn in (1, 2):
        rows = {node: trained(10 * turn + i) for i, node in enumerate(NODES)}
        copies = NODES[:3]
        for node in copies:
            rows[node] = trained(99 + turn)
        _, metrics = made.aggregate_train(turn, [reply(node, arrays) for node, arrays in rows.items()])
    weight = dict(zip(metrics["robust.nodes"], metrics["robust.coefficients"], strict=True))
    assert max(weight[node] for node in copies) < 1e-3 < max(weight.values())
    assert len(made._history) == 8
    sums = flat(trained(13)) + flat(trained(23)) - 2 * flat(SENT)
    assert_close(made._history[NODES[3]].double(), sums, atol=1e-6, rtol=1e-6)


def test_too_few_replies_leave_the_arrays(replies):
    arrays, metrics = strategy("krum", f=2).aggregate_train(3, replies[:4])
    assert arrays is None
    assert metrics["robust.skipped"] == 1
    assert metrics["loss"] == pytest.approx(np.average(range(4), weights=range(1, 5)))
    assert strategy().aggregate_train(3, []) == (None, None)


def test_nothing_usable_leaves_the_arrays(reply):
    arrays, metrics = strategy().aggregate_train(3, [reply(1, error="gone"), reply(2, {})])
    assert arrays is None
    assert (metrics["robust.failed"], metrics["robust.left_out"], metrics["robust.skipped"]) == ([1], [2], 1)


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        ("krum", {"weighted": True}, "krum takes no weights"),
        ("fltrust", {}, "root is for fltrust"),
        ("krum", {"root": root}, "root is for fltrust"),
    ],
)
def test_settings_that_do_not_fit_are_named(rule, settings, words):
    with pytest.raises(ValueError, match=words):
        RobustFedAvg(method(rule), **settings)
    with pytest.raises(ValueError, match="the server's own update is client 0"):
        RobustFedAvg(AggregateMethod(rule="fltrust", root=3), root=root)


def test_a_round_begins_with_configure_train(replies):
    with pytest.raises(ValueError, match="configure_train has to come first"):
        RobustFedAvg().aggregate_train(1, replies)


def test_the_extra_is_named_where_flower_is_missing():
    code = "import sys; sys.modules['flwr'] = None; import anabranch.integrations.flower.strategy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: RobustFedAvg needs flwr>=1.40: pip install 'anabranch[flower]'" in done.stderr


def client_app(descend):
    """Eight clients on scikit-learn's digits: 0 flips the sign, 1 sends 1e30, 2 sends NaN, 3 raises in every round.

    Everything stands inside, so that Ray's workers get it whole: they cannot import tests.
    """
    from flwr.clientapp import ClientApp

    def train(arrays, partition):
        trained, examples = descend(arrays, partition)
        factor = {0: -3.0, 1: 1e30, 2: np.nan}.get(partition, 1.0)
        update = {name: trained[name] - arrays[name] for name in trained}
        return {name: (arrays[name] + factor * update[name]).astype(np.float32) for name in arrays}, examples

    made = ClientApp()

    @made.train()
    def fit(message, context):
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

        partition = context.node_config["partition-id"]
        if partition == 3:
            raise RuntimeError("out of memory")
        sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
        arrays, examples = train(sent, partition)
        metrics = MetricRecord({"num-examples": examples, "partition": partition})
        content = {"arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @made.evaluate()
    def measure(message, context):
        from flwr.app import Message, MetricRecord, RecordDict

        partition = context.node_config["partition-id"]
        loss = float("nan") if partition == 2 else float(partition)
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return made, train


def without_flower(train, arrays, per_tensor):
    """Two rounds in float64: of eight clients one sends NaN and one fails, so two more may be hostile."""
    rule = rules.after(partial(mixes.nearest_neighbour_mixing, f=2), rules.geometric_median)
    for _ in range(2):
        rows = [train(arrays, partition)[0] for partition in (0, 1, 4, 5, 6, 7)]
        updates = {
            name: torch.from_numpy(np.stack([row[name].astype(np.float64) - arrays[name] for row in rows])).flatten(1)
            for name in arrays
        }
        whole = torch.cat(list(updates.values()), 1)
        grams = {name: each @ each.T if per_tensor else whole @ whole.T for name, each in updates.items()}
        moved = {name: (rule(grams[name]) @ updates[name]).reshape(arrays[name].shape) for name in arrays}
        arrays = {name: arrays[name] + moved[name].numpy().astype(np.float32) for name in arrays}
    return arrays


@pytest.mark.slow
def test_rounds_in_a_simulation_are_those_without_flower(descend, simulate):
    from flwr.serverapp import ServerApp

    app_of_clients, train = client_app(descend)
    start = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
    server, results = ServerApp(), {}

    @server.main()
    def main(grid, context):
        for per_tensor in (False, True):
            made = RobustFedAvg(
                method("geometric-median", "nnm", f=3),
                per_tensor=per_tensor,
                min_train_nodes=8,  # Flower counts the nodes before it waits for them
                min_evaluate_nodes=8,
            )
            results[per_tensor] = made.start(grid, record(start), num_rounds=2, timeout=120)

    simulate(server, app_of_clients)
    for per_tensor, result in results.items():
        wanted = without_flower(train, start, per_tensor)
        for name, array in arrays_of(result.arrays).items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-6, atol=1e-6)
        assert np.abs(wanted["w"]).max() > 0.01
        report = result.train_metrics_clientapp[2]
        assert [len(report[f"robust.{kind}"]) for kind in ("nodes", "left_out", "failed", "outliers")] == [6, 1, 1, 2]
        assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx((28 - 2) / 7)
    assert len(results) == 2
