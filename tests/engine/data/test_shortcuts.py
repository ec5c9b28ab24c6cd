"""Colours that tell the class at each client, and nothing over all."""

import torch

from anabranch.data.shortcuts import with_shortcut
from anabranch.data.sources import read_digits


def test_a_colour_tells_the_class_at_its_client_alone():
    plain = read_digits()
    data = with_shortcut(plain, clients=10, agree=0.9, strength=2.0)
    assert torch.equal(data.x[:, :64], plain.x)
    assert torch.equal(data.test_x[:, :64], plain.test_x)
    colours, test_colours = data.x[:, 64:].argmax(1), data.test_x[:, 64:].argmax(1)
    assert torch.equal(data.x[:, 64:], 2.0 * torch.nn.functional.one_hot(colours, 10))
    right = 0
    for client in range(10):
        mine = data.owners == client
        counts = (data.y[mine] * 10 + colours[mine]).bincount(minlength=100).view(10, 10)
        assert sorted(counts.argmax(1).tolist()) == list(range(10))  # a colour of its own for each class
        right += int(counts.max(1).values.sum())
    assert abs(right / len(data.y) - 0.9) < 0.03  # 1348 draws: a deviation of 0.008
    for y, of in ((data.y, colours), (data.test_y, test_colours)):
        shares = (y * 10 + of).bincount(minlength=100).view(10, 10) / y.bincount(minlength=10)[:, None]
        assert float(shares.max()) < 0.25  # of 0.1 in the mean: over all clients no colour belongs to a class
