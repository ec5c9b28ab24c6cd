"""Contenders of `bench federated` train the same models, and what differs is told."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.bench import federated, federated_loop, federated_methods
from anabranch.bench.machine import describe
from anabranch.bench.report import to_markdown
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import run_round

PICTURES = federated.pictures(None, most=300)


def tasks():
    return [
        federated.digits_task(3, n=40),  # two steps and a half: the half is left out for the peers
        federated.pictures_task(PICTURES, 2, convolutions=False, n=64),
        federated.pictures_task(PICTURES, 2, convolutions=True, n=32),
    ]


@pytest.mark.parametrize("task", tasks()[1:], ids=lambda task: task.name)
def test_loop_and_vmap_are_our_round(task):
    ours = federated.our_round(task.federation, 1)
    assert (ours - task.work.start).abs().max() > 100 * federated.APART  # they learned something
    contenders = [
        ("ours", lambda: ours),
        ("loop", federated_loop.Loop(task.work).round),
        ("vmap", lambda: federated_loop.vmapped_round(task.work)),
    ]
    federated.check_agreement(task.name, contenders)
    assert task.federation.round == 0  # and may be timed again


def test_another_model_is_refused():
    start = torch.zeros(3)
    with pytest.raises(ValueError, match=r"case: weights of other are 2\.0e-05 from those of ours"):
        federated.check_agreement("case", [("ours", lambda: start), ("other", lambda: start + 2e-5)])
    with pytest.raises(ValueError, match="nan"):
        federated.check_agreement("case", [("ours", lambda: start), ("other", lambda: start * torch.nan)])


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_rows_and_modules_hold_the_same_numbers(task):
    module = task.work.module()
    parameters = federated_loop.parameters_of(task.work.start, module)
    assert [p.shape for p in parameters] == [p.shape for p in module.parameters()]
    assert torch.equal(federated_loop.row_of(parameters), task.work.start)
    assert task.work.index.shape[1] % task.work.schedule.batch == 0


def test_passes_are_counted_there_and_back():
    network, mlp = federated_methods.Counted((5, 4, 3)), MLP((5, 4, 3))
    rows = mlp.first(torch.Generator().manual_seed(0))[None].repeat(2, 1)
    for leaf, times in ((rows, 1), (rows.clone().requires_grad_(), 3)):
        network.done = 0
        views = network.layout.views(leaf)
        latent, _ = network.encode(views, torch.rand(2, 7, 5), training=True)
        network.decode(views, latent, training=True)
        assert network.done == times * 14 * mlp.flops


def test_methods_passes_are_their_own():
    rows = federated_methods.measure_methods(["co-teaching", "fedlsr", "median"], clients=4, repeats=1)
    passes = {federated_methods.OWN_LOSS: 1, "fedavg": 1, "co-teaching": 2, "fedlsr": 2, "median": 1}
    assert {row.contender: row.passes for row in rows} == passes
    assert set(federated_methods.WARM) < set(federated_methods.all_methods())


def test_a_digest_is_that_of_any_number_of_threads():
    one, two = federated.digests(clients=5, rounds=2, threads=[1, 2])
    federation = federated.digits_task(5).federation
    run_round(federation)
    assert one.digest == two.digest != federated.digest(federation)


def test_the_table_has_all_rows():
    rows = (
        federated.Row(case="a", contender="ours", seconds=(0.1, 0.3, 0.2), clients=10),
        federated.Row(case="a", contender="theirs", seconds=(0.4,), clients=10, passes=2.0, peak=3_000_000),
        federated.Row(case="b", contender="ours", digest="ab" * 32),
    )
    report = federated.FederatedReport(machine=describe(), measured=rows)
    assert [row[2:] for row in report.rows()] == [
        ("200.0", "100.0 … 300.0", "50", "1.00", "", "", "", ""),
        ("400.0", "400.0 … 400.0", "25", "2.00", "2.00", "1.00", "3", ""),
        ("", "", "", "", "", "", "", "ab" * 8),
    ]
    assert "| a | theirs | 400.0 |" in to_markdown(report)


def test_a_round_of_flower_s_nodes_is_ours(tmp_path):
    pytest.importorskip("flwr.simulation", reason="Flower is not installed")
    from anabranch.bench.federated_flower import opened, write

    task = federated.digits_task(3, n=32)
    write(task, tmp_path, 2)
    for round in range(2):
        loop = opened(str(tmp_path), round)
        start = federated_loop.row_of(federated_loop.parameters_of(task.federation.server["model"][0], loop.module))
        mean = loop.total(start, range(3)) / 3
        run_round(task.federation)
        assert_close(mean, task.federation.server["model"][0], atol=federated.APART, rtol=0)
