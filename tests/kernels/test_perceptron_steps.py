"""Perceptrons whose losses are computed by torch: autograd as the peer, every instruction set, refusals."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from anabranch_kernels.native import extension
from anabranch_kernels.perceptron_sgd.op import perceptron_sgd
from anabranch_kernels.perceptron_sgd.steps import PerceptronSteps

ISAS = extension.supported_isas()
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def rows_of(widths, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    D = sum((a + 1) * b for a, b in pairwise(widths))
    return torch.randn(N, D, generator=generator) / max(widths) ** 0.5


def shown(widths, M, B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, B, widths[0], generator=generator), torch.randint(widths[-1], (M, B), generator=generator)


def outputs(row, x, widths):
    """Logits and features of one row, for autograd."""
    at, features = 0, x
    for i, (a, b) in enumerate(pairwise(widths), 1):
        z = features @ row[at : at + a * b].view(a, b) + row[at + a * b : at + a * b + b]
        at += (a + 1) * b
        if i == len(widths) - 1:
            return z, features
        features = z.relu()
    raise AssertionError


def some_loss(logits, features, y):
    """Looks at both, as no loss of a library does."""
    sharp = F.cross_entropy(2 * logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape).mean(-1)
    return sharp + 0.1 * features.square().mean((-1, -2))


def by_autograd(rows, x, y, widths, steps, live):
    rows, velocity = rows.double(), torch.zeros_like(rows, dtype=torch.float64)
    for _ in range(steps):
        for i in range(len(rows)):
            if not live[i % len(x)]:
                continue
            leaf = rows[i].clone().requires_grad_()
            logits, features = outputs(leaf, x[i % len(x)].double(), widths)
            (slope,) = torch.autograd.grad(some_loss(logits, features, y[i % len(x)]), leaf)
            velocity[i] = 0.9 * velocity[i] + slope + 1e-2 * rows[i]
            rows[i] -= 0.1 * velocity[i]
    return rows, velocity


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3), (33, 16, 17), (4, 9, 6, 2)])
def test_any_loss_descends_as_under_autograd(isa, widths):
    rows, (x, y) = rows_of(widths, 6), shown(widths, 3, 5)
    live = torch.tensor([True, False, True])
    expected = by_autograd(rows, x, y, widths, 4, live)
    velocity, before = torch.zeros_like(rows), rows.clone()
    steps = PerceptronSteps(rows, velocity, widths=widths, batch=8, isa=isa)
    for _ in range(4):
        logits, features = (said.requires_grad_() for said in steps.forward(x))
        loss = some_loss(logits, features, y.repeat(2, 1)).sum()
        slopes = torch.autograd.grad(loss, [logits, features])
        steps.step(slopes[0], slopes[1] if len(widths) > 2 else None, live, **SGD)
    assert torch.equal(rows, before)  # until it is finished
    steps.finish()
    assert_close((rows.double(), velocity.double()), expected, rtol=1e-4, atol=2e-6)
    assert torch.equal(rows[[1, 4]], before[[1, 4]])


@pytest.mark.parametrize("isa", ISAS)
def test_what_they_say_is_what_torch_says(isa):
    widths = (33, 20, 18, 7)
    rows, (x, _) = rows_of(widths, 4), shown(widths, 2, 11)
    steps = PerceptronSteps(rows, torch.zeros_like(rows), widths=widths, batch=11, isa=isa)
    logits, features = steps.forward(x)
    for i in range(4):
        z, h = outputs(rows[i].double(), x[i % 2].double(), widths)
        assert_close((logits[i].double(), features[i].double()), (z, h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_with_cross_entropy_it_is_the_whole_epoch(isa):
    widths, batch = (9, 20, 4), 4
    rows, (x, y) = rows_of(widths, 3), shown(widths, 3, 12)
    whole, moving = rows.clone(), torch.zeros_like(rows)
    index, counts = torch.arange(36).view(3, 12), torch.full((3,), 12)
    perceptron_sgd(whole, moving, x.flatten(0, 1), index, y, counts, widths=widths, batch=batch, **SGD)
    velocity = torch.zeros_like(rows)
    steps = PerceptronSteps(rows, velocity, widths=widths, batch=batch, isa=isa)
    for some_x, some_y in zip(x.split(batch, 1), y.split(batch, 1), strict=True):
        logits = steps.forward(some_x)[0].requires_grad_()
        loss = F.cross_entropy(logits.flatten(0, 1), some_y.flatten(), reduction="sum") / batch
        steps.step(torch.autograd.grad(loss, logits)[0], None, torch.ones(3, dtype=torch.bool), **SGD)
    steps.finish()
    assert_close((rows, velocity), (whole, moving), rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_no_bit():
    widths, found, threads = (20, 33, 7), [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            rows, (x, _) = rows_of(widths, 5), shown(widths, 5, 6)
            steps = PerceptronSteps(rows, torch.zeros_like(rows), widths=widths, batch=6)
            logits, features = steps.forward(x)
            steps.step(logits, features, torch.ones(5, dtype=torch.bool), **SGD)
            steps.finish()
            found.append(rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused():
    widths = (5, 7, 3)
    rows = rows_of(widths, 4)
    with pytest.raises(ValueError, match=r"velocity must be \[4, 66\]"):
        PerceptronSteps(rows, torch.zeros(4, 65), widths=widths, batch=4)
    with pytest.raises(ValueError, match="widths must be"):
        PerceptronSteps(rows, torch.zeros_like(rows), widths=(5,), batch=4)
    steps = PerceptronSteps(rows, torch.zeros_like(rows), widths=widths, batch=4)
    for x in (
        torch.zeros(4, 5),
        torch.zeros(4, 5, 5),
        torch.zeros(4, 4, 6),
        torch.zeros(4, 0, 5),
        torch.zeros(4, 4, 5).double(),
    ):
        with pytest.raises(ValueError, match=r"x must be \[M, 1 to 4, 5\] float32"):
            steps.forward(x)
    for M in (0, 3):
        with pytest.raises(ValueError, match=f"4 perceptrons cannot be shown {M} batches evenly"):
            steps.forward(torch.zeros(M, 4, 5))
    logits, features = steps.forward(torch.zeros(2, 3, 5))
    live = torch.ones(2, dtype=torch.bool)
    for bad_logits, bad_features, bad_live, match in (
        (logits[:, :2], None, live, r"slopes of logits must be \[4, 3, 3\] float32"),
        (logits, features.double(), live, r"slopes of features must be \[4, 3, 7\] float32"),
        (logits, None, live[:1], r"live must be \[2\] bool"),
        (logits, None, live.long(), r"live must be \[2\] bool"),
    ):
        with pytest.raises(ValueError, match=match):
            steps.step(bad_logits, bad_features, bad_live, lr=0.1)
