"""Scores beside a count by hand."""

import torch
from torch.testing import assert_close

from anabranch.federated.evaluate import BATCH, confusion, predict, score
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP

Y = torch.tensor([0, 0, 0, 1, 1, 2])
NAMED = torch.tensor([0, 0, 1, 1, 1, 1])  # class 2 is never named


def logits():
    return 3.0 * torch.nn.functional.one_hot(NAMED, 3).float()


def test_scores_by_hand():
    scores = score(logits(), Y)
    precision, recall = (1, 2 / 4, 0), (2 / 3, 1, 0)
    assert abs(scores.accuracy - 4 / 6) < 1e-12
    assert abs(scores.precision - sum(precision) / 3) < 1e-12
    assert abs(scores.recall - sum(recall) / 3) < 1e-12
    assert abs(scores.f1 - (2 * (2 / 3) / (5 / 3) + 2 * 0.5 / 1.5) / 3) < 1e-12
    total = torch.tensor(3.0).exp() + 2
    assert abs(scores.loss - float((4 * (total.log() - 3) + 2 * total.log()) / 6)) < 1e-6


def test_the_confusion_counts_classes_by_what_they_were_named():
    assert confusion(logits(), Y).tolist() == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]


def test_prediction_in_batches_is_prediction():
    network = MLP((4, 5, 3))
    generator = torch.Generator().manual_seed(0)
    row, x = network.first(generator), torch.randn(BATCH + 7, 4, generator=generator)
    assert_close(predict(network, row, x), forward(network, row[None], x[None]).logits[0])
