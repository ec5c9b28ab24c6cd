"""Sweeps give what the rules give on all numbers at once, however they are cut, ordered, stored and attacked."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.aggregate import sources, sweep
from anabranch.aggregate.job import aggregate_tensors
from anabranch.aggregate.method import decide
from anabranch.aggregate.settings import MIXES, RULES, AggregateMethod, AggregateOptions

FLOATS = ("matrix", "vector", "number", "empty")
VALUES = {"f": 1, "radius": 4.0, "own": 4, "root": 3, "clip": 3.0, "step": 0.25, "bucket": 2}


def method_of(rule, *pre):
    taken = {*RULES[rule], *(option for step in pre for option in MIXES[step])}
    return AggregateMethod(rule=rule, pre=pre, **{name: value for name, value in VALUES.items() if name in taken})


METHODS = [
    *(method_of(rule) for rule in RULES),
    method_of("geometric-median", "nnm"),
    method_of("trimmed-mean", "nnm"),
    method_of("krum", "adaptive-clipping", "nnm"),
    method_of("coordinate-median", "static-clipping"),
    method_of("mean", "bucketing"),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)


def flat(tensors, names=FLOATS):
    return torch.cat([tensors[name].flatten() for name in names]).double()


def by_coordinate(points, method):
    """[M, D] to [D], number by number."""
    ordered = np.sort(points.numpy(), axis=0)
    M = len(ordered)
    median = np.median(ordered, axis=0)
    trimmed = ordered[VALUES["f"] : M - VALUES["f"]].mean(0)

    def nearest(middle, drop):
        order = np.argsort(np.abs(ordered - middle), axis=0, kind="stable")
        return np.take_along_axis(ordered, order[: M - drop], 0).mean(0)

    return torch.from_numpy(
        {
            "coordinate-median": lambda: median,
            "lower-median": lambda: ordered[(M - 1) // 2],
            "trimmed-mean": lambda: trimmed,
            "mean-around-median": lambda: nearest(median, VALUES["f"]),
            "bulyan": lambda: nearest(median, 2 * VALUES["f"]),
            "phocas": lambda: nearest(trimmed, VALUES["f"]),
            "sign-majority": lambda: VALUES["step"] * np.sign(np.sign(ordered).sum(0)),
        }[method.rule]()
    )


def on_points(points, base, method):
    """The result [D] of a method on clients' vectors [N, D], all at once and in float64."""
    apart = points - base
    decision = decide(method, apart @ apart.T, resolution=2.0**-52)
    mixed = decision.rows @ apart
    return base + (by_coordinate(mixed, method) if method.by_coordinate or method.rule == "bulyan" else mixed[0])


@by_method
@pytest.mark.parametrize("based", [False, True], ids=["alone", "based"])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 24], ids=["tiles", "whole"])
def test_whole_is_the_rule_on_the_concatenation(method, based, tile_bytes, make_clients):
    clients = make_clients(9)
    base = make_clients(1, seed=7)[0] if based else None
    with patch.object(sources, "TILE_BYTES", tile_bytes):
        tensors, report = aggregate_tensors(clients, method, base=base)
    points = torch.stack([flat(client) for client in clients])
    wanted = on_points(points, flat(base) if based else torch.zeros(points.shape[1], dtype=torch.float64), method)
    assert_close(flat(tensors), wanted, atol=3e-6, rtol=3e-6)  # float32 inputs, values up to 10
    assert_close(report.distances, (points - flat(tensors)).norm(dim=1), rtol=1e-4, atol=1e-3)
    assert_close(report.pairwise, (points[:, None] - points[None]).norm(dim=2), rtol=1e-4, atol=1e-3)
    if report.coefficients is not None and not based:
        assert_close(report.coefficients[0] @ points, wanted, atol=3e-6, rtol=3e-6)


@by_method
def test_per_tensor_is_each_tensor_alone(method, make_clients):
    clients = make_clients(9)
    options = AggregateOptions(per_tensor=True)
    tensors, report = aggregate_tensors(clients, method, options)
    for t, name in enumerate(clients[0]):
        alone, own = aggregate_tensors([{name: client[name]} for client in clients], method)
        assert torch.equal(tensors[name], alone[name]), name
        if report.coefficients is not None:
            assert torch.equal(report.coefficients[t], own.coefficients[0])


# Where one neighbour counts, as in Bulyan's last rounds, two that are nearest to each other tie, and the first wins.
# Buckets are drawn by places.
@pytest.mark.parametrize(
    "method",
    [method for method in METHODS if "bulyan" not in method.rule and "bucketing" not in method.pre],
    ids=lambda method: method.title,
)
def test_clients_may_come_in_any_order(method, make_clients):
    clients = make_clients(9)
    order = [4, 0, 8, 3, 1, 7, 2, 6, 5]
    moved = {name: order.index(getattr(method, name)) for name in ("own", "root") if getattr(method, name) is not None}
    values = {name: getattr(method, name) for name in ("f", "radius", "step", "clip")} | moved
    other = AggregateMethod(rule=method.rule, pre=method.pre, **values)
    first, report = aggregate_tensors(clients, method)
    second, shuffled = aggregate_tensors([clients[i] for i in order], other)
    assert_close(flat(second), flat(first), atol=2e-6, rtol=2e-6)
    assert torch.equal(second["steps"], first["steps"])
    assert_close(shuffled.distances, report.distances[order], rtol=1e-5, atol=1e-3)


@given(st.integers(1, 40), st.integers(0, 3))
def test_how_tiles_are_cut_changes_no_bit_of_means_and_medians_of_coordinates(kib, seed):
    clients = [{"w": torch.randn(9000, generator=torch.Generator().manual_seed(8 * seed + i))} for i in range(5)]
    for method in (AggregateMethod(rule="mean"), AggregateMethod(rule="coordinate-median")):
        whole, _ = aggregate_tensors(clients, method)
        with patch.object(sources, "TILE_BYTES", kib << 10):
            cut, _ = aggregate_tensors(clients, method)
        assert torch.equal(cut["w"], whole["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(dtype, make_clients, tolerance):
    clients = make_clients(7, dtype=dtype)
    for method in (
        AggregateMethod(rule="mean"),
        AggregateMethod(),
        AggregateMethod(rule="trimmed-mean", pre=("nnm",), f=1),
    ):
        tensors, _ = aggregate_tensors(clients, method)
        assert {name: x.dtype for name, x in tensors.items()} == {name: x.dtype for name, x in clients[0].items()}
        points = torch.stack([flat(client) for client in clients])
        wanted = on_points(points, torch.zeros(points.shape[1], dtype=torch.float64), method)
        assert_close(flat(tensors), wanted, **tolerance(dtype))


def test_counters_and_masks_are_lower_medians_of_what_was_sent(make_clients):
    clients = make_clients(6)
    for method in (AggregateMethod(rule="mean"), AggregateMethod(rule="krum", f=1)):
        tensors, _ = aggregate_tensors(clients, method)
        for name in ("steps", "mask"):
            sent = torch.stack([client[name] for client in clients])
            assert torch.equal(tensors[name], sent.to(torch.int64).sort(0).values[2].to(sent.dtype))


def test_a_given_client_comes_out_bit_for_bit(make_clients):
    clients = make_clients(7)
    tensors, report = aggregate_tensors(clients, AggregateMethod(rule="krum", f=2))
    best = report.coefficients[0].tolist().index(1.0)
    assert all(torch.equal(tensors[name], clients[best][name]) for name in FLOATS)


@pytest.mark.parametrize("based", [False, True])
def test_a_first_client_far_away_costs_a_sweep_and_nothing_else(based, make_clients):
    clients = make_clients(9)
    far = {name: x + 1e7 if x.is_floating_point() else x for name, x in clients[0].items()}
    base = far if based else None
    hostile = clients[1:] if based else [far, *clients[1:]]
    names = []
    with patch.object(sweep._Job, "sweep", spy(sweep._Job.sweep, names)):
        tensors, report = aggregate_tensors(hostile, AggregateMethod(), base=base)
    assert names == ["products", "products", "result"]
    points = torch.stack([flat(client) for client in hostile])
    wanted = on_points(points, points[1], AggregateMethod())
    assert_close(flat(tensors), wanted, atol=3e-6, rtol=3e-6)
    assert (0 in report.outliers) is not based


def spy(function, names):
    def call(self, name, *args, **kwargs):
        names.append(name)
        return function(self, name, *args, **kwargs)

    return call


@pytest.mark.parametrize("distances", [True, False])
def test_each_method_reads_as_often_as_it_must(distances, make_clients):
    for method, wanted in (
        (AggregateMethod(rule="mean"), ["result"]),
        (AggregateMethod(rule="coordinate-median"), ["result"]),
        (AggregateMethod(), ["products", "result"]),
        (AggregateMethod(rule="trimmed-mean", pre=("nnm",), f=1), ["products", "result"]),
    ):
        names = []
        with patch.object(sweep._Job, "sweep", spy(sweep._Job.sweep, names)):
            _, report = aggregate_tensors(make_clients(9), method, AggregateOptions(distances=distances))
        assert names == wanted
        assert (report.distances is not None) is (distances or method == AggregateMethod())


def test_krum_reads_one_client_the_second_time():
    D = 5000
    clients = [{"w": torch.randn(D, generator=torch.Generator().manual_seed(i))} for i in range(7)]
    _, report = aggregate_tensors(clients, AggregateMethod(rule="krum", f=1))
    assert report.bytes_read == (7 + 1) * D * 4


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize(
    "method",
    [AggregateMethod(rule="mean"), AggregateMethod(), AggregateMethod(rule="phocas", f=2)],
    ids=lambda m: m.rule,
)
@pytest.mark.parametrize("distances", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_clients_that_are_not_finite_are_named_or_dropped(bad, distances, method, make_clients):
    clients = make_clients(9)
    clients[0]["vector"][1050], clients[4]["matrix"][30, 30], clients[4]["vector"][3] = bad, bad, bad
    with patch.object(sources, "TILE_BYTES", 1):
        with pytest.raises(ValueError, match="not finite: client 0 in vector; client 4 in matrix"):
            aggregate_tensors(clients, method, AggregateOptions(distances=distances))
        options = AggregateOptions(distances=distances, non_finite="drop")
        tensors, report = aggregate_tensors(clients, method, options)
        left, own = aggregate_tensors(
            [client for i, client in enumerate(clients) if i not in (0, 4)],
            method if method.f is None else AggregateMethod(rule=method.rule, f=method.f - 2),
            AggregateOptions(distances=distances),
        )
    assert report.dropped == {0: "vector", 4: "matrix"}
    assert_close(flat(tensors), flat(left), atol=1e-6, rtol=1e-6)
    if report.distances is not None:
        assert report.distances.isnan().tolist() == [True, *[False] * 3, True, *[False] * 4]
        assert_close(report.distances[1:4], own.distances[:3], rtol=1e-5, atol=1e-3)


def test_too_many_that_are_not_finite_are_refused(make_clients):
    clients = make_clients(9)
    clients[0]["vector"][0] = clients[4]["vector"][0] = torch.nan
    with pytest.raises(ValueError, match="2 clients are not finite, and f=1 says that fewer may be bad"):
        aggregate_tensors(clients, AggregateMethod(rule="krum", f=1), AggregateOptions(non_finite="drop"))


@pytest.mark.parametrize("method", [method_of("sign-majority"), method_of("centred-clipping")], ids=lambda m: m.rule)
def test_a_base_or_a_result_that_is_not_finite_is_refused(method, make_clients):
    *clients, base = make_clients(6)
    base["vector"][5] = torch.inf
    with pytest.raises(ValueError, match="not finite: the base in vector"):
        aggregate_tensors(clients, method, AggregateOptions(non_finite="drop"), base=base)


def test_a_result_beyond_its_dtype_is_refused():
    clients = [{"w": torch.full((3,), sign * 300.0).half()} for sign in (1, 1, -1)]
    clients[0]["w"] *= 200
    with pytest.raises(ValueError, match="the result, unlike the clients, in w"):
        aggregate_tensors(clients, AggregateMethod(rule="sign-majority", step=1e6))


def test_nobody_trusted_leaves_the_base():
    root = torch.tensor([1.0, 2.0])
    for dtype in (torch.float32, torch.float64):
        clients = [{"w": (-root * k).to(dtype)} for k in (-1, 1, 2, 3)]
        tensors, report = aggregate_tensors(clients, AggregateMethod(rule="fltrust", root=0))
        assert torch.equal(tensors["w"], torch.zeros(2, dtype=dtype))
        assert report.weights.tolist() == [0.0] * 4


def test_a_minority_far_away_does_not_move_the_result(make_clients):
    honest = make_clients(9)
    hostile = [{n: torch.full_like(x, 1e30) if x.is_floating_point() else x for n, x in c.items()} for c in honest[:3]]
    middle = torch.stack([flat(client) for client in honest]).mean(0)
    for method in (
        AggregateMethod(),
        AggregateMethod(pre=("nnm",), f=3),
        AggregateMethod(rule="trimmed-mean", f=3),
        AggregateMethod(rule="bulyan", f=2),
    ):
        tensors, report = aggregate_tensors([*hostile[: method.f or 3], *honest], method)
        assert (flat(tensors) - middle).norm() < 0.1 * len(middle) ** 0.5
        assert report.outliers == list(range(method.f or 3))
