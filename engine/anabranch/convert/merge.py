"""Several key heads in one: rank-one merging per rotary frequency, which RoPE cannot see.

A head of width D is F = D/2 complex numbers, x[f] + i x[f + D/2], which RoPE at position p turns by exp(i p theta_f).
A complex factor of a key can therefore be moved to the queries that read it, exactly and for every pair of positions:

    Re( q_f conj(c_f s_f) e^{i (p - r) theta_f} ) = Re( conj(c_f) q_f conj(s_f) e^{i (p - r) theta_f} )

So the K heads j of a group can share one head s if each keeps a factor c_jf per frequency, inside the rows of W_Q that
read it. What is lost is least where

    sum_j a_jf E |k_jf - c_jf s_f|^2,    k_jf = M_jf h,  s_f = W_f h,    M_jf and W_f complex rows

is: the best rank-one approximation of sqrt(a) M S^(1/2) with S = E h h^T. With u its left singular vector, which is the
top eigenvector of the small matrix sqrt(a_j) E[k_j conj(k_l)] sqrt(a_l), the answer is c = u / sqrt(a) and
W = sum_j conj(u_j) sqrt(a_j) M_j: a mixture of the heads. So E[k_j conj(k_l)] is all that need be known, S need not be
invertible, and a bias is merged like one more input. a_jf, the sum of E |q_f|^2 over the queries of head j, weighs an
error by how loudly it is read.

From the literature  mean pooling of the heads of a group (GQA, arXiv 2305.13245); the best low-rank approximation
                     (Eckart, Young, Mirsky).
Reconstructed here   one complex factor per head and frequency, as all that commutes with RoPE; the weights a, which
                     take queries and keys for independent and their phases for even.
Shared               convert/model.py takes the weights of a layer apart and puts them together.

Sizes   Hq query heads, Hk K heads, N merged heads of m = Hk / N adjacent ones, F frequencies, n inputs.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a layer's merge depends on.

    gram     [F, Hk, Hk] complex128, E k_j conj(k_l)
    energy   [Hk, F] float64, the weights a: E |q|^2 summed over the query heads of a K head
    """

    gram: Tensor
    energy: Tensor

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> Self:
        """Sums over n samples: queries [Hq, F, n] and keys [Hk, F, n] complex, before or after RoPE: it cancels out.

        Samples are tokens, or the inputs of the projections when their covariance is taken for the identity.
        """
        energy = queries.abs().square().sum(-1).unflatten(0, (len(keys), -1)).sum(1)
        by_frequency = keys.transpose(0, 1)
        return cls(gram=by_frequency @ by_frequency.mH, energy=energy)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(gram=self.gram + other.gram, energy=self.energy + other.energy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """How heads become one: s = sum over a group of mix_j k_j, and k_j is read as factors_j s. Both [Hk, F] complex."""

    heads: int
    mix: Tensor
    factors: Tensor

    def shared_keys(self, keys: Tensor) -> Tensor:
        """The merged projection [N, F, n] of keys [Hk, F, n]."""
        shared: Tensor = (self.mix[..., None] * keys).unflatten(0, (self.heads, -1)).sum(1)
        return shared

    def fold_queries(self, queries: Tensor) -> Tensor:
        """Queries [Hq, F, n] as the merged heads are to be read: times conj(c) of their K head."""
        return queries * self.factors.conj().repeat_interleave(len(queries) // len(self.factors), 0)[..., None]


def merge_by_mean(statistics: Statistics, heads: int) -> Merge:
    """Plain mean pooling into N heads; queries stay as they are."""
    ones = torch.ones_like(statistics.energy, dtype=torch.complex128)
    return Merge(heads=heads, mix=ones * heads / len(ones), factors=ones)


def merge_by_svd(statistics: Statistics, heads: int) -> Merge:
    """The merge into N heads with the least `merge_error`.

    What the product c s leaves open is settled so that healing starts from balanced weights: the factors of a group
    have the mean square one, and their sum has no phase.
    """
    weights = statistics.energy.sqrt().unflatten(0, (heads, -1)).permute(2, 0, 1)  # [F, N, m]
    gram = _within_groups(statistics.gram, heads) * weights[..., :, None] * weights[..., None, :]
    top = torch.linalg.eigh(gram).eigenvectors[..., -1]
    factors = torch.where(weights > 0, top / weights, 0)  # a head that nobody reads may have any factor
    size = factors.abs().square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    scale = torch.polar(size, factors.sum(-1, keepdim=True).angle())
    mix, factors = top.conj() * weights * scale, factors / scale
    return Merge(heads=heads, mix=_as_heads(mix), factors=_as_heads(factors))


def merge_error(statistics: Statistics, merge: Merge) -> Tensor:
    """sum_j a_jf E |k_jf - c_jf s_f|^2 of each K head and frequency: [Hk, F] float64."""
    gram = _within_groups(statistics.gram, merge.heads)  # [F, N, m, m]
    mix, factors = (x.unflatten(0, (merge.heads, -1)).permute(2, 0, 1) for x in (merge.mix, merge.factors))
    left = torch.eye(gram.shape[-1], dtype=gram.dtype) - factors[..., :, None] * mix[..., None, :]
    return statistics.energy * _as_heads((left @ gram @ left.mH).diagonal(dim1=-2, dim2=-1).real)


def key_energy(statistics: Statistics) -> Tensor:
    """sum_j a_jf E |k_jf|^2, what `merge_error` is a share of: [Hk, F] float64."""
    return statistics.energy * statistics.gram.diagonal(dim1=-2, dim2=-1).real.T


def to_complex(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * 2F, n] of a projection (or its outputs over n tokens) -> complex128 [heads, F, n]."""
    real, imaginary = rows.double().unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.complex(real, imaginary)


def to_rows(heads: Tensor) -> Tensor:
    """The inverse of `to_complex`: complex [heads, F, n] -> float64 [heads * 2F, n]."""
    return torch.stack([heads.real, heads.imag], 1).flatten(0, 2)


def _within_groups(gram: Tensor, heads: int) -> Tensor:
    """The blocks of [F, Hk, Hk] on the diagonal that belong to N groups: [F, N, m, m]."""
    blocks: Tensor = gram.unflatten(2, (heads, -1)).unflatten(1, (heads, -1)).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1)


def _as_heads(x: Tensor) -> Tensor:
    """[F, N, m] -> [Hk, F]."""
    return x.flatten(1).T
