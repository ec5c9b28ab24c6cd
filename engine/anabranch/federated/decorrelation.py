"""A penalty on features that go together, which labels that are wrong bring about. FedDecorr, arXiv 2210.00226

    z = (h - mean) / sqrt(var + 1e-8)     over the samples of a batch, each feature by itself
    M = z^T z  [d, d]                     (B - 1) times the correlations
    R = mean over i != j of M_ij^2 / B    (B - 1)^2 / B where all features go together, 0 where none do

The squares of M and of z z^T [B, B] have one sum, so the smaller of the two is formed: O(B^2 d) instead of O(B d^2)
operations where features are many. Local training adds R to the loss of any method (Schedule.decorrelation; 0.1 in
FNBench's code, where only FedAvg, methods that train like it and FedELC can have it).

A feature that hardly varies within a batch is scaled up as well as any other: batches of a handful of samples, and
rectified features that are almost dead, make slopes of 1 / sqrt(var) that small steps must outweigh.
"""

import torch
from torch import Tensor

EPS = 1e-8


def correlation(features: Tensor, real: Tensor) -> Tensor:
    """R of each network's batch: features [W * N, B, d], real [N, B] bool (samples that count) -> [W * N].

    0 where fewer than two samples count, or there is but one feature.
    """
    B, d = features.shape[1:]
    counts = real.sum(1).repeat(len(features) // len(real))
    mask = real.repeat(len(features) // len(real), 1)[..., None]
    mean = (features * mask).sum(1, keepdim=True) / counts.clamp_min(1)[:, None, None]
    apart = (features - mean) * mask
    variance = apart.square().sum(1, keepdim=True) / (counts - 1).clamp_min(1)[:, None, None]
    z = apart / torch.sqrt(variance + EPS)
    products = z @ z.mT if d > B else z.mT @ z
    others = products.square().sum((1, 2)) - z.square().sum(1).square().sum(1)
    return others / (counts.clamp_min(1) * max(1, d * (d - 1)))
