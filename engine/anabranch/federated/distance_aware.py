"""Distance-aware aggregation: a noisy client counts the less, the farther it is from the nearest clean one.

    d_k = min over clean j of  sum over tensors l of ||w_k,l - w_j,l||   for noisy k, 0 for clean k
    w   = sum_k a_k w_k,   a_k ~ p_k exp(-d_k / max d)

Where all clients of a round are noisy, or none is, all d are 0. FedNoRo, arXiv 2305.05230.
"""

import torch
from torch import Tensor

from anabranch.federated.method import Replies, Tensors
from anabranch_kernels.geometric_median.op import combine


def distance_aware(server: Tensors, replies: Replies) -> Tensor:
    """The new model [1, D] of a federation of one network; `server` holds noisy [K] bool and sizes [L]."""
    assert replies.models is not None
    noisy = server["noisy"][replies.clients]
    if bool(noisy.all()) or not bool(noisy.any()):
        return replies.mean
    weights = distance_weights(replies.models[:, 0], noisy, server["sizes"], replies.weights)
    return combine(replies.models.transpose(0, 1), weights[None], server["model"])


def nearest_clean(models: Tensor, noisy: Tensor, sizes: Tensor) -> Tensor:
    """d [m] float64 of models [m, D], noisy [m] bool, not all; sizes [L] of the tensors that a model consists of."""
    between = torch.zeros(int(noisy.sum()), int((~noisy).sum()), dtype=torch.float64)
    for part in models.split(sizes.tolist(), 1):
        part = part.double()
        # products of matrices would lose what near models differ by
        between += torch.cdist(part[noisy], part[~noisy], compute_mode="donot_use_mm_for_euclid_dist")
    distances = torch.zeros(len(models), dtype=torch.float64)
    distances[noisy] = between.amin(1)
    return distances


def distance_weights(models: Tensor, noisy: Tensor, sizes: Tensor, shares: Tensor) -> Tensor:
    """a [m] float64 with sum one, of shares p [m] float64; the rest as for `nearest_clean`."""
    distances = nearest_clean(models, noisy, sizes)
    farthest = distances.max()
    weights = shares * torch.exp(-distances / farthest) if farthest > 0 else shares
    return weights / weights.sum()
