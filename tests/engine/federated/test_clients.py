"""Clients trained at once are clients trained one by one, by torch's own layers and optimiser."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from anabranch.federated.clients import accuracy, first_model, logits, train


def alone(row, hidden):
    """A torch module with the weights of one row."""
    sizes = [64, hidden, 10] if hidden else [64, 10]
    parts, start = [], 0
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        layer.weight.data = row[start : start + inputs * outputs].view(inputs, outputs).T.clone()
        layer.bias.data = row[start + inputs * outputs : start + (inputs + 1) * outputs].clone()
        start += (inputs + 1) * outputs
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def flat(module):
    return torch.cat([p.T.flatten() if p.ndim == 2 else p for p in module.parameters()]).detach()


@pytest.mark.parametrize("hidden", [0, 7])
def test_training_at_once_is_training_alone(hidden):
    random = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, 11, 64, generator=random), torch.randint(10, (3, 11), generator=random)
    model = first_model(hidden, random)
    updates = train(model, x, y, hidden=hidden, steps=4, lr=0.3)
    for i in range(3):
        module = alone(model, hidden)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        assert_close(logits(model[None], x[i : i + 1], hidden)[0], module(x[i]))
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(module(x[i]), y[i]).backward()
            optimizer.step()
        assert_close(model + updates[i], flat(module), rtol=1e-5, atol=1e-6)  # sums of another order, float32


def test_accuracy_counts():
    model = torch.zeros(650)
    model[640 + 4] = 1  # the bias of class 4: every picture is a four
    assert accuracy(model, torch.rand(8, 64), torch.tensor([4, 4, 1, 2, 4, 3, 3, 3]), 0) == 3 / 8
