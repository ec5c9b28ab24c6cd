"""Each attack is what its paper says, beside a loop or a formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.federated import attacks

clouds = st.builds(
    lambda N, D, seed: torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5,
    st.integers(5, 15),
    st.integers(1, 9),
    st.integers(0, 2**16),
)


@given(clouds, st.integers(0, 4))
def test_attacks_by_the_mean(honest, f):
    mean = honest.mean(0)
    assert_close(attacks.sign_flip(honest, f, scale=3.0), (-3 * mean).expand(f, -1))
    assert_close(attacks.inner_product_manipulation(honest, f, epsilon=0.1), (-0.1 * mean).expand(f, -1))
    spread = ((honest - mean) ** 2).sum(0).div(len(honest) - 1).sqrt()
    assert_close(attacks.a_little_is_enough(honest, f, z=1.5), (mean - 1.5 * spread).expand(f, -1))
    assert_close(attacks.constant(honest, f, value=7.0), torch.full((f, honest.shape[1]), 7.0).double())


def test_how_much_is_a_little():
    """The paper's example: of 50 workers 24 are hostile, two honest ones must be farther out: z = 1.43 at 24 of 26."""
    honest = torch.randn(26, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = ((honest.mean(0) - attacks.a_little_is_enough(honest, 24)[0]) / honest.std(0)).mean()
    assert z == pytest.approx(1.426, abs=1e-3)


@given(clouds)
def test_mimic_copies_who_is_farthest_along_the_widest_direction(honest):
    _, _, directions = torch.linalg.svd(honest - honest.mean(0), full_matrices=False)
    extent = ((honest - honest.mean(0)) @ directions[0]).abs()
    sent = attacks.mimic(honest, 3)
    assert sent.shape == (3, honest.shape[1])
    assert (sent == sent[0]).all()
    copied = (honest == sent[0]).all(1).nonzero()[0, 0]
    assert extent[copied] == pytest.approx(extent.max().item(), rel=1e-9)


@given(clouds)
def test_noise_has_its_length_and_its_seed(honest):
    sent = attacks.gaussian(honest, 4, scale=2.0, generator=torch.Generator().manual_seed(1))
    assert_close(sent.norm(dim=1), torch.full((4,), 2 * honest.norm(dim=1).mean().item()).double())
    assert_close(sent, attacks.gaussian(honest, 4, scale=2.0, generator=torch.Generator().manual_seed(1)))


def test_labels_turn_around():
    y = torch.arange(10)
    assert attacks.label_flip(y, 10).tolist() == list(range(9, -1, -1))
    assert attacks.label_flip(attacks.label_flip(y, 10), 10).equal(y)


@given(clouds)
def test_reordered_logits(logits):
    if logits.shape[1] < 2:
        return
    sent = attacks.logits_reordered(logits)
    assert_close(sent.sort(1).values, logits.sort(1).values, rtol=0, atol=0)  # the same confidences
    order = logits.argsort(1, descending=True)
    for row, ranks, given_ in zip(sent, order, logits, strict=True):
        for rank, label in enumerate(ranks):
            assert row[label] == given_[ranks[rank - 1]]  # the first class takes the last value
    assert (sent.argmax(1) == order[:, 1]).all()


def test_peaked_and_unknowing_logits():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    sent = attacks.logits_peaked(logits, peak=0.6).softmax(1)
    assert_close(sent.max(1).values, torch.full((6,), 0.6))
    assert (sent.argmax(1) == logits.argsort(1, descending=True)[:, 1]).all()
    assert_close(sent.sort(1).values[:, :-1], torch.full((6, 4), 0.1))
    assert_close(attacks.logits_unknowing(logits).softmax(1), torch.full((6, 5), 0.2))
    with pytest.raises(ValueError, match=r"peak must be in \(0, 1\), got 1"):
        attacks.logits_peaked(logits, peak=1.0)
