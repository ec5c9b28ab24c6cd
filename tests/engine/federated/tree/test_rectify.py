"""What a rule may do to a teacher's predictions, and the ring rule against one sample after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.federated.tree.rectify import MARGIN, empty, mix, parse_rule, rectify_by_ring, swap, wrong

RULES = ("ring:3", "ring", "swap", "mix", "mix:0", "mix:0.9", "mix:1")


@st.composite
def told(draw):
    """Predictions [B, C], some sure, some with ties, and classes."""
    B, C = draw(st.integers(1, 9)), draw(st.integers(2, 5))
    steps = draw(st.lists(st.integers(-12, 12), min_size=B * C, max_size=B * C))
    scale = draw(st.sampled_from((0.1, 1.0, 8.0)))
    p = (torch.tensor(steps).view(B, C) * scale).softmax(1)
    return p, torch.tensor(draw(st.lists(st.integers(0, C - 1), min_size=B, max_size=B)))


@pytest.mark.parametrize("text", RULES)
@settings(max_examples=40)
@given(told())
def test_right_predictions_pass_and_wrong_ones_become_right(text, told):
    p, y = told
    rule, length = parse_rule(text)
    repaired, _ = rule(p, y, empty(p.shape[1], length))
    right = ~wrong(p, y)
    assert torch.equal(repaired[right], p[right])
    assert torch.equal(repaired.argmax(1), y)
    assert float(repaired.min()) >= 0
    assert_close(repaired.sum(1), torch.ones(len(y)))


@pytest.mark.parametrize("text", RULES)
@settings(max_examples=40)
@given(told())
def test_the_other_classes_keep_their_order(text, told):
    p, y = told
    rule, length = parse_rule(text)
    repaired, _ = rule(p, y, empty(p.shape[1], length))
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    if text == "swap":  # puts down the one that was the largest
        others = others.scatter(1, p.argmax(1, keepdim=True), False)
    for before, after, kept in zip(p, repaired, others, strict=True):
        before, after = before[kept], after[kept]
        assert bool((after[before.argsort(stable=True)].diff() >= 0).all())


def one_after_another(p, y, q, histories):
    """The rule of the specification, with lists."""
    out = []
    for row, c in zip(p.double().tolist(), y.tolist(), strict=True):
        if max(range(len(row)), key=lambda j: (row[j], -j)) == c:
            histories[c] = [*histories[c], row[c]][-q:]
            out.append(row)
            continue
        aim = max(sum(histories[c]) / len(histories[c]) if histories[c] else max(row), row[c])
        row = [aim if j == c else value * (1 - aim) / (1 - row[c]) for j, value in enumerate(row)]
        most = max(value for j, value in enumerate(row) if j != c)
        if row[c] <= most:
            row[c] = most + MARGIN
            row = [value / sum(row) for value in row]
        out.append(row)
    return torch.tensor(out)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 1000), st.integers(1, 25))
def test_the_ring_is_one_sample_after_another_in_whatever_pieces(q, seed, piece):
    drawn = torch.Generator().manual_seed(seed)
    p, y = torch.randn(25, 3, generator=drawn).softmax(1), torch.randint(0, 3, (25,), generator=drawn)
    histories = {c: [] for c in range(3)}
    wanted = one_after_another(p, y, q, histories)
    ring, parts = empty(3, q), []
    for some, of in zip(p.split(piece), y.split(piece), strict=True):
        repaired, ring = rectify_by_ring(some, of, ring)
        parts.append(repaired)
    # at a tie within rounding one of the two may be lifted by the margin and the other not
    assert_close(torch.cat(parts), wanted, atol=1e-6, rtol=1e-5, check_dtype=False)
    for c in range(3):
        assert int(ring.counts[c]) == len(histories[c])
        assert_close(ring.values[c, q - len(histories[c]) :], torch.tensor(histories[c], dtype=torch.float32))


def test_the_ring_by_hand():
    ring = empty(3, 2)
    p = torch.tensor([[0.2, 0.7, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    repaired, ring = rectify_by_ring(p, torch.tensor([1, 1, 1, 1, 2]), ring)
    mean = (0.5 + 0.8) / 2  # the oldest of three has left a ring of two
    assert_close(repaired[3], torch.tensor([0.6 * (1 - mean) / 0.7, mean, 0.1 * (1 - mean) / 0.7]))
    assert_close(repaired[4], torch.tensor([0.4 * 0.6 / 0.9, 0.4 * 0.3 / 0.9, 0.6]))  # nothing of class 2 yet: its top
    assert ring.counts.tolist() == [0, 2, 0]


def test_nothing_comes_of_nothing():
    _, ring = rectify_by_ring(torch.tensor([[0.9, 0.1]]), torch.tensor([0]), empty(2, 3))
    repaired, after = rectify_by_ring(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ring)
    assert repaired.shape == (0, 2)
    assert all(map(torch.equal, after, ring))


def test_the_simple_rules_by_hand():
    p, y = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([2])
    assert_close(swap(p, y), torch.tensor([[0.1, 0.3, 0.6]]))
    assert_close(mix(p, y, 0.5), torch.tensor([[0.3, 0.15, 0.55]]))
    repaired, _ = parse_rule("off")[0](p, y, empty(3, 1))
    assert torch.equal(repaired, p)


@pytest.mark.parametrize("text", ["on", "ring:0", "ring:1.5", "ring:x", "swap:2", "mix:2", "mix:", "off:1", "ring:nan"])
def test_rules_that_there_are_not(text):
    with pytest.raises(ValueError, match=r"rectify is|share of the prediction"):
        parse_rule(text)
