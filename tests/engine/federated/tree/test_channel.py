"""Only what may cross does, and every byte is counted."""

import pytest
import torch

from anabranch.federated.tree.channel import Channel, Crossing


def test_bytes_are_counted_by_link_and_kind():
    channel = Channel(10, 7)
    channel.send("predictions", 3, torch.zeros(5, 10), up=True)
    channel.send("predictions", 3, torch.zeros(2, 10), up=True)
    channel.send("predictions", 3, torch.zeros(5, 10), up=False)
    channel.send("embeddings", 4, torch.zeros(6, 7), up=True)
    channel.send("labels", 4, torch.zeros(6, 1, dtype=torch.int32), up=True)
    assert channel.take() == {
        Crossing("predictions", 3, True): 7 * 40, Crossing("predictions", 3, False): 200,
        Crossing("embeddings", 4, True): 6 * 28, Crossing("labels", 4, True): 24,
    }  # fmt: skip
    assert not channel.take()


def test_what_arrives_shares_nothing_with_what_was_sent():
    sent = torch.ones(1, 2, requires_grad=True)
    arrived = Channel(2, 3).send("predictions", 1, sent, up=False)
    assert not arrived.requires_grad
    arrived.zero_()
    assert sent.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("weights", torch.zeros(5, 10)),
        ("predictions", torch.zeros(1210)),  # a model
        ("embeddings", torch.zeros(5, 1, 8, 8)),  # pictures
        ("embeddings", torch.zeros(5, 64)),
        ("predictions", torch.zeros(5, 7)),
        ("predictions", torch.zeros(5, 10, dtype=torch.float64)),
        ("labels", torch.zeros(5, 1)),
    ],
)
def test_weights_and_pictures_do_not_cross(kind, values):
    with pytest.raises(ValueError, match=r"cross a link|must be"):
        Channel(10, 7).send(kind, 1, values, up=True)
