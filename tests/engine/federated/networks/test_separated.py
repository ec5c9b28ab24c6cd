"""A network with heads that divide its features: by masks, in evaluation by its own, and what it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.networks.separated import Separated


def made(factors=3, N=2):
    """A network of 7 features in 3 factors of 3, 3 and 1, with heads that are not zero, and its rows."""
    network, generator = Separated(MLP((5, 7, 4)), factors=factors, near=4.0), torch.Generator().manual_seed(3)
    rows = torch.stack([network.first(generator) for _ in range(N)])
    rows[:, : network.heads] = torch.randn(N, network.heads, generator=generator)
    return network, rows, torch.randn(N, 6, 5, generator=generator)


def test_before_the_heads_have_learned_it_is_the_base():
    base = MLP((5, 7, 4))
    network = Separated(base, factors=3, near=4.0)
    row, x = network.first(torch.Generator().manual_seed(1))[None], torch.randn(1, 6, 5)
    assert torch.equal(row[:, network.heads :], base.first(torch.Generator().manual_seed(1))[None])
    assert torch.equal(forward(network, row, x).logits, forward(base, row[:, network.heads :], x).logits)
    assert torch.equal(forward(network, row, x, training=True).logits, forward(network, row, x).logits)
    features = forward(network, row, x).features
    T = network.transition(network.layout.views(row), features)
    assert torch.equal(T, (4.0 * torch.eye(4)).expand(1, 6, 4, 4))


@pytest.mark.parametrize(("factors", "blocks"), [(3, [3, 3, 1]), (16, [1] * 7), (1, [7]), (4, [2, 2, 2, 1])])
def test_factors_are_consecutive_features(factors, blocks):
    network, _, _ = made(factors)
    assert network.factors == len(blocks)
    masks = torch.arange(1.0, len(blocks) + 1)[None, None]
    resistant, sensitive = network.divide(torch.ones(1, 1, 7), masks)
    assert sensitive.flatten().tolist() == [i + 1 for i, block in enumerate(blocks) for _ in range(block)]
    assert torch.equal(resistant + sensitive, torch.ones(1, 1, 7))


def test_in_evaluation_the_class_is_told_without_what_is_more_likely_sensitive():
    network, rows, x = made()
    out, views = forward(network, rows, x), network.layout.views(rows)
    for n in range(2):
        h = out.features[n]
        pi = (h @ views["separation.weight"][n] + views["separation.bias"][n]).sigmoid()
        m = (pi > 0.5).float()[:, [0, 0, 0, 1, 1, 1, 2]]
        assert 0 < float(m.mean()) < 1
        assert_close(out.logits[n], ((1 - m) * h) @ views["1.weight"][n] + views["1.bias"][n])


def test_without_sensitive_factors_all_samples_have_one_matrix():
    network, rows, x = made()
    views, h = network.layout.views(rows), forward(network, rows, x).features
    parts = network.parts(views, h, torch.zeros(2, 6, 3))
    bias = (views["transition.bias"].unflatten(1, (4, 4)) + 4 * torch.eye(4))[:, None]
    assert torch.equal(parts.transition, bias.expand(2, 6, 4, 4))
    assert torch.equal(parts.sensitive, torch.zeros_like(h))
    assert_close(parts.logits, forward(network, rows, x, training=True).logits)
    of_label = F.linear(h[1, 2], views["transition.weight"][1].T, views["transition.bias"][1]).unflatten(0, (4, 4))
    all_sensitive = network.parts(views, h, torch.ones(2, 6, 3))
    assert_close(all_sensitive.transition[1, 2], of_label + 4 * torch.eye(4))


def test_the_last_layer_stays_last_and_statistics_behind_it():
    base = ResNet(1, 8, 8, 3, wide=8, blocks=(1, 1, 1, 1), norm="batch")
    network = Separated(base, factors=8, near=4.0)
    assert network.layout.head == base.layout.head == ("head.weight", "head.bias")
    assert network.layout.trained == base.layout.trained + network.heads
    assert network.batch_statistics
    row = network.first(torch.Generator().manual_seed(0))[None]
    out = forward(network, row, torch.rand(1, 4, 1, 8, 8), training=True)
    assert out.statistics.shape[1] == network.layout.size - network.layout.trained
