"""Learned labels: the closed forms beside autograd, and what the loss is at its ends."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.labels.learned import first_labels, merged, share_of_smallest, slopes


def drawn(seed, *shape, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plainly(logits, labels, y, chosen, alpha, beta):
    """The loss of each sample as the equations read."""
    C, r, s = logits.shape[-1], logits.softmax(-1), labels.softmax(-1)
    divergence = (r * (r.log() - s.log())).sum(-1)
    entropy = -(r * r.log()).sum(-1)
    held = -s.gather(-1, y[..., None]).squeeze(-1).log()
    return divergence / C + alpha * chosen.double() * held + beta * entropy / C


@settings(max_examples=50)
@given(
    classes=st.integers(2, 12),
    size=st.integers(1, 9),
    seed=st.integers(0, 1000),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_closed_forms_are_autograds(classes, size, seed, alpha, beta, dtype):
    logits, labels = drawn(seed, 2, size, classes, dtype=dtype), drawn(seed + 1, 2, size, classes, dtype=dtype)
    y = torch.randint(0, classes, (2, size), generator=torch.Generator().manual_seed(seed))
    chosen = drawn(seed + 2, 2, size) > 0
    z, t = logits.double().requires_grad_(), labels.double().requires_grad_()
    loss = plainly(z, t, y, chosen, alpha, beta)
    dz, dt = torch.autograd.grad(loss.sum(), (z, t))
    ours = slopes(logits, labels, y, chosen, alpha=alpha, beta=beta)
    # float32: r and s hold 24 bits, the sums up to 12 terms of |log r| up to about 30
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.loss.double(), loss.detach(), atol=atol, rtol=1e-6)
    torch.testing.assert_close(ours.logits.double(), dz, atol=min(atol, 1e-6), rtol=1e-6)
    torch.testing.assert_close(ours.labels.double(), dt, atol=min(atol, 1e-6), rtol=1e-6)
    assert float(ours.labels.sum(-1).abs().max()) < 1e-6
    assert float(ours.logits.sum(-1).abs().max()) < 1e-5


def test_labels_that_agree_with_the_network_stay():
    logits, y = drawn(0, 6, 4), torch.zeros(6, dtype=torch.int64)
    nobody = torch.zeros(6, dtype=torch.bool)
    ours = slopes(logits, logits + 7, y, nobody, alpha=0.5, beta=0.0)  # a softmax does not see the seven
    torch.testing.assert_close(ours.labels, torch.zeros(6, 4, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(ours.loss, torch.zeros(6, dtype=torch.float64), atol=1e-14, rtol=0)


def test_certain_labels_are_one_hot_and_cost_nothing_to_hold():
    y = torch.tensor([2, 0, 1])
    labels = first_labels(y, 3, 1e4)
    assert torch.equal(labels.softmax(-1), F.one_hot(y, 3).float())
    everybody, nobody = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    logits = drawn(1, 3, 3, dtype=torch.float32)
    held = slopes(logits, labels, y, everybody, alpha=0.5, beta=0.1)
    free = slopes(logits, labels, y, nobody, alpha=0.5, beta=0.1)
    assert torch.equal(held.loss, free.loss)
    assert held.loss.isfinite().all()


def test_the_first_certainty_is_the_published_one():
    share = first_labels(torch.tensor([3]), 10, 10.0).softmax(-1)[0, 3]
    assert float(share) == pytest.approx(0.9996, abs=5e-5)


def test_merging_what_agrees_is_sure_of_it():
    labels, logits = drawn(2, 5, 4), drawn(3, 5, 4)
    torch.testing.assert_close(merged(labels, logits, 10.0), 5 * (labels.softmax(-1) + logits.softmax(-1)))
    torch.testing.assert_close(merged(labels, labels, 1.0), labels.softmax(-1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_the_smallest_are_as_many_as_wanted_and_ties_go_to_the_first(losses, padding, share):
    row = torch.tensor([losses + [0] * padding], dtype=torch.float32)
    real = torch.arange(row.shape[1])[None] < len(losses)
    chosen = share_of_smallest(row, real, share)[0].nonzero().flatten().tolist()
    expected = sorted(range(len(losses)), key=lambda i: (losses[i], i))[: int(share * len(losses))]
    assert chosen == sorted(expected)
