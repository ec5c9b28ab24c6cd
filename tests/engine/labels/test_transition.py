"""Transition matrices of samples: identities, enumeration over all labels and masks, and autograd as the peer."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from anabranch.labels.noise import pairs, symmetric_matrix, target_matrix
from anabranch.labels.transition import (
    cross_correlation,
    drawn,
    entropy,
    forward_losses,
    label_column,
    policy_losses,
    posterior,
    straight_through,
    transition,
)  # fmt: skip

EPS = 1e-3


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rows_are_on_the_simplex_and_nothing_is_below_the_least(scale):
    T = transition(normal(3, 7, 5, 5, scale=scale), EPS)
    assert_close(T.sum(-1), torch.ones(3, 7, 5, dtype=torch.float64))
    assert bool((T >= EPS / 5).all())


@pytest.mark.parametrize("C", [1, 2, 10, 37])
def test_a_label_s_column_and_its_slope_are_those_of_the_whole_matrix(C):
    logits, z = normal(2, 9, C, C).requires_grad_(), normal(2, 9, C, seed=3).requires_grad_()
    y = labels(2, 9, classes=C)
    column = label_column(logits, y, EPS)
    q = torch.einsum("nbi,nbij->nbj", z.softmax(-1), transition(logits, EPS)).gather(-1, y[..., None]).squeeze(-1)
    ours = -(z.softmax(-1) * column).sum(-1).log() - column.square().sum(-1)
    T_y = transition(logits, EPS).gather(-1, y[..., None, None].expand(2, 9, C, 1)).squeeze(-1)
    theirs = -q.log() - T_y.square().sum(-1)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), (logits, z)), torch.autograd.grad(theirs.sum(), (logits, z)))


def test_a_column_s_slope_is_that_of_finite_differences():
    logits, y = normal(2, 3, 3).requires_grad_(), torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda a: label_column(a, y, EPS), (logits,))


def test_expected_labels_sum_to_one():
    logits, p = normal(6, 4, 4), normal(6, 4, seed=2).softmax(-1)
    q = [(p * label_column(logits, torch.full((6,), j), EPS)).sum(-1) for j in range(4)]
    assert_close(sum(q), torch.ones(6, dtype=torch.float64))


def test_with_the_identity_the_loss_is_the_cross_entropy():
    z, y = normal(8, 5), labels(8, classes=5)
    column = label_column((1e4 * torch.eye(5, dtype=torch.float64)).expand(8, 5, 5), y, 0.0)
    assert_close(-(z.softmax(-1) * column).sum(-1).log(), F.cross_entropy(z, y, reduction="none"))


def test_one_matrix_for_all_samples_is_forward_correction():
    A, z, y = normal(5, 5), normal(8, 5, seed=4), labels(8, classes=5)
    ours = -(z.softmax(-1) * label_column(A.expand(8, 5, 5), y, EPS)).sum(-1).log()
    assert_close(ours, forward_losses(z, transition(A, EPS), y))
    assert_close(ours, -(z.softmax(-1) @ transition(A, EPS)).log()[torch.arange(8), y])


def test_forward_correction_of_each_client_by_its_own_matrix():
    z, y = normal(2, 8, 5), labels(2, 8, classes=5)
    T = torch.stack([symmetric_matrix(0.3, 5), target_matrix(0.4, pairs(5))])  # this one has zeros
    found = forward_losses(z.requires_grad_(), T[:, None], y)
    for i in range(2):
        assert_close(found[i], -(z[i].softmax(-1) @ T[i]).log()[torch.arange(8), y[i]])
    (slope,) = torch.autograd.grad(found.sum(), z)
    assert bool(slope.isfinite().all())


def test_the_clean_posterior_is_a_minimiser_under_symmetric_noise():
    """On a table of samples, with the expected loss over labels: no slope in p's or T's logits at the truth."""
    p, T = normal(6, 4, scale=2.0).softmax(-1), symmetric_matrix(0.4, 4)
    z, A = p.log().requires_grad_(), T.log().expand(6, 4, 4).clone().requires_grad_()
    q = p @ T
    loss = sum(
        -(q[:, j] * (z.softmax(-1) * label_column(A, torch.full((6,), j), 0.0)).sum(-1).log()).sum() for j in range(4)
    )
    for slope in torch.autograd.grad(loss, (z, A)):
        assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_posteriors_are_bayes_by_enumeration():
    p, T = normal(4).softmax(-1), transition(normal(4, 4, seed=5), EPS)
    joint = torch.tensor([[float(p[i] * T[i, j]) for j in range(4)] for i in range(4)], dtype=torch.float64)
    for j in range(4):
        assert_close(posterior(p, T[:, j]), joint[:, j] / joint[:, j].sum())


def test_renaming_classes_renames_rows_and_columns():
    logits, order = normal(5, 4, 4), torch.tensor([2, 0, 3, 1])
    renamed = logits[:, order][:, :, order]
    assert_close(transition(renamed, EPS), transition(logits, EPS)[:, order][:, :, order])
    y = labels(5, classes=4)
    assert_close(label_column(renamed, y, EPS), label_column(logits, order[y], EPS)[:, order])


def all_masks(F):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=F)), dtype=torch.float64)


@pytest.mark.parametrize("factors", [1, 4, 6])
@pytest.mark.parametrize("baseline", [0.0, -2.5])
def test_the_policy_s_slope_has_no_bias(factors, baseline):
    """Its average over all masks is the slope of the expected reward."""
    s, masks = normal(factors).requires_grad_(), all_masks(factors)
    reward = normal(len(masks), seed=7)
    probability = (masks * s.sigmoid() + (1 - masks) * (1 - s.sigmoid())).prod(1)
    (exact,) = torch.autograd.grad(-(probability * reward).sum(), s, retain_graph=True)
    losses = policy_losses(reward[None], torch.tensor([baseline]), masks[None], s.expand(1, len(masks), factors))
    (estimated,) = torch.autograd.grad((probability.detach() * losses[0]).sum(), s)
    assert_close(estimated, exact)


def test_a_constant_reward_pulls_nowhere():
    s, masks = normal(5).requires_grad_(), all_masks(5)
    probability = (masks * s.sigmoid() + (1 - masks) * (1 - s.sigmoid())).prod(1).detach()
    losses = policy_losses(torch.full((1, 32), 3.0), torch.zeros(1), masks[None], s.expand(1, 32, 5))
    (slope,) = torch.autograd.grad((probability * losses[0]).sum(), s)
    assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_masks_are_drawn_as_often_as_they_should_be():
    s = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0])
    uniform = ((torch.arange(1000) + 0.5) / 1000)[:, None].expand(1000, 5)  # every quantile once
    assert_close(drawn(s.expand(1000, 5), uniform).mean(0), s.sigmoid(), atol=1e-3, rtol=0)


def test_straight_through_has_the_same_masks_and_the_relaxed_slope():
    s = normal(200, 3).requires_grad_()
    uniform = torch.rand(200, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for temperature in (1.0, 0.3):
        m = straight_through(s, uniform, temperature)
        assert_close(m.detach(), drawn(s, uniform))
        soft = ((s + torch.logit(1 - uniform)) / temperature).sigmoid()
        assert torch.equal((soft > 0.5).double(), drawn(s, uniform))
        (slope,) = torch.autograd.grad(m.sum(), s)
        assert_close(slope, soft * (1 - soft) / temperature)


def test_straight_through_stands_the_ends_of_the_interval():
    s = torch.zeros(2, requires_grad=True)
    (slope,) = torch.autograd.grad(straight_through(s, torch.tensor([0.0, 1 - 2.0**-24]), 0.3).sum(), s)
    assert bool(slope.isfinite().all())


def test_entropy():
    assert float(entropy(torch.zeros(6))) == pytest.approx(6 * math.log(2))
    assert float(entropy(torch.tensor([80.0, -80.0]))) == pytest.approx(0, abs=1e-6)
    s = normal(4)
    p = s.sigmoid()
    assert_close(entropy(s), -(p * p.log() + (1 - p) * (1 - p).log()).sum())


def ragged(*sizes):
    longest = max(sizes)
    return torch.stack([(torch.arange(longest) < size) / size for size in sizes]).double()


@pytest.mark.parametrize(("d", "e"), [(3, 4), (20, 30)])  # both products
def test_cross_correlation_is_numpy_s(d, e):
    import numpy as np

    a, b, weight = normal(2, 9, d), normal(2, 9, e, seed=1), ragged(9, 6)
    found = cross_correlation(a, b, weight)
    for i, size in enumerate((9, 6)):
        both = np.corrcoef(a[i, :size].numpy(), b[i, :size].numpy(), rowvar=False)[:d, d:]
        assert float(found[i]) == pytest.approx((both**2).mean(), rel=1e-9)


def test_orthogonal_and_constant_columns_do_not_correlate():
    basis = torch.linalg.qr(torch.cat([torch.ones(8, 1, dtype=torch.float64), normal(8, 7)], 1)).Q[None]
    weight = ragged(8)
    assert float(cross_correlation(basis[..., 1:4], basis[..., 4:], weight)) == pytest.approx(0, abs=1e-12)
    constant = torch.full((1, 8, 2), 0.1, dtype=torch.float64).requires_grad_()
    found = cross_correlation(constant, normal(1, 8, 3), weight)
    assert float(found.detach()) == 0
    (slope,) = torch.autograd.grad(found.sum(), constant)
    assert bool(slope.isfinite().all())
