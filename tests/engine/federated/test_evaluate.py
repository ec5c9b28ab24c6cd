"""Scores beside a count by hand."""

import numpy as np
import torch
from torch.testing import assert_close

from anabranch.federated.evaluate import BATCH, confusion, effective_rank, look, predict, score, spectrum
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
    logits, features = look(network, row, x)
    out = forward(network, row[None], x[None])
    assert_close(logits, out.logits[0])
    assert_close(features, out.features[0])
    assert_close(predict(network, row, x), logits)


def test_the_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    along = torch.linalg.qr(torch.randn(400, 3, generator=generator) - 0.0).Q
    along = torch.linalg.qr(along - along.mean(0)).Q  # three directions, uncorrelated and alike
    features = along @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3]
    values = spectrum(features)
    assert values.shape == (8,)
    assert abs(effective_rank(values) - 3) < 1e-3
    assert abs(effective_rank(spectrum(10 * features + 7)) - 3) < 1e-3  # neither scale nor place matters
    assert effective_rank(spectrum(torch.ones(5, 4))) == 0
    assert effective_rank(spectrum(torch.arange(5.0)[:, None])) == 1  # a single feature


def test_the_spectrum_is_that_of_numpys_covariance():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double()
    expected = np.linalg.svd(np.cov(features.numpy().T), compute_uv=False)
    assert_close(spectrum(features), torch.from_numpy(expected))
