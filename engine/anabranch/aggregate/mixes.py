"""What is done to points before a rule sees them, as a matrix: each new point is a row of coefficients of the given.

gram [N, N] float64   ->   [M, N]        used as after(partial(nearest_neighbour_mixing, f=2), geometric_median)
"""

import torch
from torch import Tensor

from anabranch.aggregate.rules import squared_distances


def nearest_neighbour_mixing(gram: Tensor, f: int) -> Tensor:
    """Every point becomes the mean of the N - f points nearest to it, itself included (NNM, arXiv 2302.01772)."""
    N = len(gram)
    if not 0 <= f < N:
        raise ValueError(f"f must be in 0..N - 1, got {f=}, {N=}")
    nearest = squared_distances(gram).fill_diagonal_(-1).argsort(dim=1, stable=True)[:, : N - f]
    return torch.zeros_like(gram).scatter_(1, nearest, 1 / (N - f))


def bucketing(gram: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Points are drawn into buckets of `size`, the last maybe smaller; each becomes its mean (arXiv 2006.09365)."""
    N = len(gram)
    if size < 1:
        raise ValueError(f"buckets must hold at least one point, got {size=}")
    order = torch.randperm(N, generator=generator, device=generator.device).to(gram.device)
    bucket = torch.arange(N, device=gram.device) // size
    rows = gram.new_zeros(-(-N // size), N)
    rows[bucket, order] = 1
    return rows / rows.sum(1, keepdim=True)


def static_clipping(gram: Tensor, radius: float) -> Tensor:
    """Points longer than `radius` are cut to it. Around zero."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    return (radius / gram.diagonal().clamp_min(0).sqrt().clamp_min(radius)).diag()


def adaptive_clipping(gram: Tensor, f: int) -> Tensor:
    """The floor(2f (N - f) / N) longest points are cut to the next one's (ARC, arXiv 2405.14432). Around zero."""
    N = len(gram)
    if f < 0 or 2 * f >= N:
        raise ValueError(f"f must be at least 0 and 2f < N, got {f=}, {N=}")
    norms = gram.diagonal().clamp_min(0).sqrt()
    limit = norms.sort().values[N - 2 * f * (N - f) // N - 1]
    return torch.where(norms > limit, limit / norms, 1.0).diag()
