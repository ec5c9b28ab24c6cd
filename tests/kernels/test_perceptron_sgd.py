"""SGD of perceptrons: torch's own SGD as the peer, every instruction set, odd sizes, refusals."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.native import extension
from anabranch_kernels.perceptron_sgd import cpu, gpu, reference
from anabranch_kernels.perceptron_sgd.op import MOST_LAYERS, perceptron_sgd

ISAS = extension.supported_isas()
SGD = {"batch": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def case(widths=(5, 7, 3), counts=(9, 4, 6), M=20, seed=0, moving=0.1):
    """Rows, velocities, samples, indices, classes and counts."""
    generator = torch.Generator().manual_seed(seed)
    N, n, D = len(counts), max(counts, default=0), sum((a + 1) * b for a, b in pairwise(widths))
    rows = torch.randn(N, D, generator=generator) / max(widths) ** 0.5
    velocity = moving * torch.randn(N, D, generator=generator)
    x = torch.randn(M, widths[0], generator=generator)
    index = torch.randint(M, (N, n), generator=generator)
    y = torch.randint(widths[-1], (N, n), generator=generator)
    return rows, velocity, x, index, y, torch.tensor(counts, dtype=torch.int64)


def after(train, tensors, widths=(5, 7, 3), batch=4, lr=0.1, momentum=0.9, weight_decay=1e-2, **more):
    """Rows and velocities that `train` makes of copies of them."""
    rows, velocity, *rest = tensors
    rows, velocity = rows.clone(), velocity.clone()
    train(rows, velocity, *rest, widths, batch, lr, momentum, weight_decay, **more)
    return rows, velocity


def by_reference(tensors, *arguments, **more):
    return after(reference.perceptron_sgd, tensors, *arguments, **more)


def by_gpu_s_code(tensors, *arguments, **more):
    return after(gpu.perceptron_sgd, tensors, *arguments, **more)


def trained(tensors, isa=ISAS[-1], *arguments, **more):
    return after(cpu.perceptron_sgd, tensors, *arguments, isa=isa, **more)


def by_torch(row, x, y, widths, batch, epochs=1):
    """One perceptron of torch.nn under torch.optim.SGD, in float64 and without velocity to begin with."""
    layers = [torch.nn.Linear(a, b).double() for a, b in pairwise(widths)]
    module = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())][:-1])
    at = 0
    with torch.no_grad():
        for layer, (a, b) in zip(layers, pairwise(widths), strict=True):
            layer.weight.copy_(row[at : at + a * b].view(a, b).T)
            layer.bias.copy_(row[at + a * b : at + a * b + b])
            at += (a + 1) * b
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(epochs):
        for some_x, some_y in zip(x.double().split(batch), y.split(batch), strict=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(module(some_x), some_y).backward()
            optimiser.step()
    return torch.cat([part.flatten() for layer in layers for part in (layer.weight.detach().T, layer.bias.detach())])


@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3), (4, 9, 6, 2)])
def test_the_reference_is_torch_s_own_sgd(widths):
    rows, _, x, index, y, counts = case(widths, (11, 4, 6))
    velocity = torch.zeros_like(rows)
    expected = [
        by_torch(row, x[at[:count]], label[:count], widths, 4, epochs=2)
        for row, at, label, count in zip(rows, index, y, counts.tolist(), strict=True)
    ]
    double, moving = rows.double(), velocity.double()
    for _ in range(2):  # velocities live on
        reference.perceptron_sgd(double, moving, x, index, y, counts, widths, **SGD)
    assert_close(double, torch.stack(expected), rtol=1e-12, atol=1e-12)


sizes = st.integers(1, 40)


@settings(max_examples=40)
@given(
    st.lists(sizes, min_size=2, max_size=5),
    st.lists(st.integers(0, 21), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_every_instruction_set_trains_as_the_reference(widths, counts, batch, seed):
    tensors = case(tuple(widths), tuple(counts), seed=seed)
    expected = by_reference(tensors, widths, batch, lr=0.02)
    assert_close(by_gpu_s_code(tensors, widths, batch, lr=0.02), expected, rtol=1e-4, atol=2e-6)
    for isa in ISAS:
        # some steps, each off by a few roundings of sums of up to 40 terms
        assert_close(trained(tensors, isa, widths, batch, lr=0.02), expected, rtol=1e-4, atol=2e-6, msg=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", [(64, 64, 10), (33, 16, 17), (200, 130, 100, 65), (3,) * (MOST_LAYERS + 1)])
def test_widths_that_fill_panels_and_that_do_not(isa, widths):
    tensors = case(widths, (70, 33, 16), M=50)
    expected = by_reference(tensors, widths, 32, lr=0.01)
    assert_close(trained(tensors, isa, widths, 32, lr=0.01), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums_round_seldom(isa):
    """As many terms in a row round so often that rectifiers turn over: weights are 1e-3 from torch's then."""
    widths = (1 << 14, 3)
    rows, _, x, *rest = case(widths, (4,) * 8, M=32)
    tensors = rows.abs() * 0.5, torch.zeros_like(rows), x.abs(), *rest
    exact = by_reference(tensors, widths, momentum=0.0)[1][:, -3:]  # slopes of the biases: predictions less labels
    got = trained(tensors, isa, widths, momentum=0.0)[1][:, -3:]
    assert (got - exact).abs().max() < 7e-6  # 3.4e-6 here, 1.7e-5 as one sum


@pytest.mark.parametrize("isa", ISAS)
def test_nobody_else_changes_a_bit_nor_does_the_number_of_threads(isa):
    tensors = case((20, 33, 7), (19, 0, 8, 30, 1), M=60)
    together = trained(tensors, isa, (20, 33, 7))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for ours, theirs in zip(trained(tensors, isa, (20, 33, 7)), together, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    rows, velocity, x, *of_each = tensors
    for i in range(len(rows)):
        own, moving, *mine = (tensor[i : i + 1] for tensor in (rows, velocity, *of_each))
        for ours, theirs in zip(trained((own, moving, x, *mine), isa, (20, 33, 7)), together, strict=True):
            assert torch.equal(ours[0], theirs[i])


@pytest.mark.parametrize("isa", ISAS)
def test_who_has_no_samples_stays(isa):
    tensors = case(counts=(0, 5, 0))
    rows, velocity = trained(tensors, isa)
    for i in (0, 2):
        assert torch.equal(rows[i], tensors[0][i])
        assert torch.equal(velocity[i], tensors[1][i])
    assert not torch.equal(rows[1], tensors[0][1])


def test_nobody_and_nothing_are_fine():
    for counts in ((), (0, 0)):
        rows, velocity, *rest = case(counts=counts)
        before = rows.clone()
        perceptron_sgd(rows, velocity, *rest, widths=(5, 7, 3), **SGD)
        assert torch.equal(rows, before)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_beyond_the_counts_is_never_looked_at(isa):
    tensors = case(counts=(3, 9))
    expected = trained(tensors, isa)
    tensors[3][0, 3:], tensors[4][0, 3:] = 10**12, -7
    assert_close(by_gpu_s_code(tensors, (5, 7, 3)), expected, rtol=1e-4, atol=2e-6)
    for ours, theirs in zip(trained(tensors, isa), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_no_number_shows(isa, bad):
    tensors = case()
    tensors[2][tensors[3][1, 0], 2] = bad
    tensors[3][0] = tensors[3][2] = (tensors[3][1, 0] + 1) % 20  # the others never meet it
    rows, _ = trained(tensors, isa)
    assert rows[1].isnan().any()
    assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_sure_predictions_do_not_overflow(isa):
    tensors = case((5, 3), moving=0.0)
    tensors[0].mul_(300)
    assert_close(trained(tensors, isa, (5, 3)), by_reference(tensors, (5, 3)), rtol=1e-4, atol=1e-3)  # of about 100


def test_tensors_may_lie_anyhow():
    rows, velocity, x, index, y, counts = case()
    expected = trained((rows, velocity, x, index, y, counts))
    scattered = [torch.stack([t, t], -1)[..., 0] for t in (x, index, y, counts)]
    perceptron_sgd(rows, velocity, *scattered, widths=(5, 7, 3), **SGD)
    assert torch.equal(rows, expected[0])


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("index", 20, r"index must be in \[0, 20\), got 20 in row 1"),
        ("index", -1, r"index must be in \[0, 20\), got -1 in row 1"),
        ("y", 3, r"y must be in \[0, 3\), got 3 in row 1"),
        ("counts", 10, r"counts must be in \[0, 10\), got 10 in row 1"),
        ("counts", -1, r"counts must be in \[0, 10\), got -1 in row 1"),
    ],
)
def test_what_does_not_exist_is_refused_and_nothing_is_trained(name, value, match):
    tensors = dict(zip(("rows", "velocity", "x", "index", "y", "counts"), case(), strict=True))
    tensors[name].view(3, -1)[1, 0] = value
    before = tensors["rows"].clone()
    with pytest.raises(ValueError, match=match):
        perceptron_sgd(*tensors.values(), widths=(5, 7, 3), **SGD)
    assert torch.equal(tensors["rows"], before)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"velocity": torch.zeros(3, 65)}, r"velocity must be \[3, 66\]"),
        ({"rows": torch.zeros(3, 65), "velocity": torch.zeros(3, 65)}, r"rows must be \[3, 66\] for widths"),
        ({"x": torch.zeros(20, 4)}, r"x must be \[M, 5\]"),
        ({"x": torch.zeros(20, 5, dtype=torch.float64)}, "x must have 2 dimensions, torch.float32"),
        ({"y": torch.zeros(3, 8, dtype=torch.int64)}, "index and y"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "counts"),
        ({"index": torch.zeros(3, 9, dtype=torch.int32)}, "index must have 2 dimensions, torch.int64"),
        ({"rows": torch.zeros(66, 3).T, "velocity": torch.zeros(66, 3).T}, "rows"),
    ],
)
def test_what_does_not_fit_is_refused(changed, match):
    tensors = dict(zip(("rows", "velocity", "x", "index", "y", "counts"), case(), strict=True))
    with pytest.raises(ValueError, match=match):
        perceptron_sgd(*{**tensors, **changed}.values(), widths=(5, 7, 3), **SGD)


@pytest.mark.parametrize("widths", [(5,), (5, 0, 3), (5,) * (MOST_LAYERS + 2)])
def test_widths_that_are_no_perceptron_are_refused(widths):
    with pytest.raises(ValueError, match="widths must be 2 to 17 positive numbers"):
        perceptron_sgd(*case(), widths=widths, **SGD)


def test_rows_in_place_must_be_contiguous():
    rows, velocity, *rest = case()
    with pytest.raises(ValueError, match="and contiguous"):
        perceptron_sgd(rows.T.contiguous().T, velocity, *rest, widths=(5, 7, 3), **SGD)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        perceptron_sgd(rows, velocity, *rest, widths=(5, 7, 3), batch=0, lr=0.1)


def test_torch_s_own_check_of_ops():
    arguments = (*case(), [5, 7, 3], 4, 0.1, 0.9, 1e-2)
    torch.library.opcheck(torch.ops.anabranch.perceptron_sgd.default, arguments)


def test_it_compiles():
    def step(rows, velocity, *rest):
        perceptron_sgd(rows, velocity, *rest, widths=(5, 7, 3), **SGD)
        return rows * 1

    tensors = case()
    expected = trained(tensors)[0]
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), expected)
