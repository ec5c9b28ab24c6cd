"""Which labels are clean, from a mixture of two normal distributions of the losses. arXiv 1904.11238, 2002.07394

Losses are scaled to [0, 1]; the component with the smaller mean is taken to be that of the clean labels. Expectation
maximisation for all rows at once, with the settings of DivideMix's code, which calls scikit-learn: 100 steps at most,
until the mean log-likelihood of a row moves by less than 0.01, 0.0005 added to the variances.

Not as there   it starts from the best split of a row in two (2-means, exact by sorting); scikit-learn's k-means begins
               at random and finds that split or a worse one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEPS, TOLERANCE, ADDED_VARIANCE = 100, 1e-2, 5e-4
AT_LEAST = 10 * torch.finfo(torch.float64).eps  # samples of a component, added as scikit-learn does


class Mixture(NamedTuple):
    """Of each of N rows the share, mean and variance of its two components, [2, N, 1] float64 each."""

    share: Tensor
    mean: Tensor
    variance: Tensor

    def log_densities(self, x: Tensor) -> Tensor:
        """Logarithms of share times density, [2, N, n], of x [N, n]."""
        scale = self.share.log() - (2 * math.pi * self.variance).log() / 2
        return scale - (x - self.mean).square() / (2 * self.variance)


def clean_posteriors(losses: Tensor, real: Tensor) -> Tensor:
    """Of each sample the probability that it belongs to the component of small losses, one mixture for each row.

    losses  [N, n]
    real    [N, n] bool      samples that count; the others get 0
    returns [N, n] float32   1 in a row whose losses are all equal, or not numbers: nothing tells them apart
    """
    losses = losses.detach().double()
    lowest = losses.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    highest = losses.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    posteriors = real.float()
    told = ((lowest < highest) & (highest - lowest).isfinite())[:, 0]
    if told.any():
        x = ((losses - lowest) / (highest - lowest))[told].masked_fill(~real[told], 0.0)
        mixture = fit(x, real[told])
        densities = mixture.log_densities(x)
        small = mixture.mean.argmin(0, keepdim=True).expand(1, *x.shape)
        posteriors[told] *= densities.softmax(0).gather(0, small)[0].float()
    return posteriors


def fit(x: Tensor, real: Tensor) -> Mixture:
    """Mixtures of the real ones [N, n] of x [N, n] float64, which are 0 elsewhere; at least two in each row."""
    mixture = _maximised(x, real, _split(x, real))
    counts = real.sum(1, keepdim=True)
    before = torch.full_like(counts, -math.inf, dtype=x.dtype)
    goes_on = torch.ones_like(counts, dtype=torch.bool)
    for _ in range(STEPS):
        densities = mixture.log_densities(x)
        whole = torch.logaddexp(densities[0], densities[1])
        new = _maximised(x, real, (densities - whole).exp() * real)
        mixture = Mixture(*(torch.where(goes_on, *pair) for pair in zip(new, mixture, strict=True)))
        likelihood = (whole * real).sum(1, keepdim=True) / counts
        goes_on &= (likelihood - before).abs() >= TOLERANCE
        before = likelihood
        if not goes_on.any():
            break
    return mixture


def _split(x: Tensor, real: Tensor) -> Tensor:
    """[2, N, n]: 1 where a sample is below, or above, the cut that leaves the least squares around the two means."""
    ordered = x.masked_fill(~real, torch.inf).sort(1).values
    counts, below = real.sum(1, keepdim=True), torch.arange(1, x.shape[1])
    sums = x.sum(1, keepdim=True)
    under = ordered[:, :-1].masked_fill(below > counts, 0.0).cumsum(1)
    between = under.square() / below + (sums - under).square() / (counts - below)
    cut = between.masked_fill(below >= counts, -torch.inf).argmax(1, keepdim=True)
    is_below = x <= ordered.gather(1, cut)
    return torch.stack([is_below & real, ~is_below & real]).double()


def _maximised(x: Tensor, real: Tensor, shares: Tensor) -> Mixture:
    """The likeliest mixture of x [N, n] for shares [2, N, n] of each sample in the components."""
    sizes = shares.sum(2, keepdim=True) + AT_LEAST
    mean = (shares * x).sum(2, keepdim=True) / sizes
    variance = (shares * (x - mean).square()).sum(2, keepdim=True) / sizes + ADDED_VARIANCE
    return Mixture(sizes / sizes.sum(0), mean, variance)
