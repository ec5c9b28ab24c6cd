"""A right label becomes a wrong one in a way that depends on the sample: T(x)[i, j] = P(label j | class i, x).

    T = (1 - eps) softmax_rows(A + a I) + eps / C     rows on the simplex, no entry below eps / C
    q = p T                                           what the labels are expected to be, p what the classes are
    P(class i | label y, x) = p_i T_iy / q_y          i = y: the label is right

A loss of the given label y needs the column T[:, y] alone: q_y = sum_i p_i T_iy. Its slope in closed form, with S the
softmax and g the slope in the column: dA_ij = (1 - eps) g_i S_iy ([j = y] - S_ij).

What a sample is seen by may be divided by masks m in {0, 1} that are drawn, m_f = 1 with probability sigmoid(s_f).
Masks have no slope; `policy_losses` has that of an expected reward, REINFORCE (Williams, 1992), and `straight_through`
a biased one of less variance (arXiv 1308.3432, 1611.00712).

Forward correction by one matrix for all samples: Patrini et al., arXiv 1609.03683.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.labels.softmax import log_softmax, softmax

LEAST_VARIANCE = 1e-12  # columns that vary less are constant, and go together with nothing


def transition(logits: Tensor, eps: float) -> Tensor:
    """T [..., C, C] of logits A + a I [..., C, C]."""
    return (1 - eps) * softmax(logits) + eps / logits.shape[-1]


def label_column(logits: Tensor, y: Tensor, eps: float) -> Tensor:
    """T[..., :, y]: how likely each class is to get the given label; T itself is never made.

    logits  [..., C, C]   A + a I
    y       [...] int64
    returns [..., C]      entry i is T[i, y]
    """
    column: Tensor = _Column.apply(logits, y, eps)  # type: ignore[no-untyped-call]
    return column


class _Column(torch.autograd.Function):
    """Keeps the logits alone for the way back, where autograd's own would keep a softmax and a scattered slope."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, eps: float) -> Tensor:
        index = y[..., None, None].expand(*logits.shape[:-1], 1)
        share = (logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)).exp()
        ctx.save_for_backward(logits, index, share)
        ctx.eps = eps
        return share * (1 - eps) + eps / logits.shape[-1]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, index, share = ctx.saved_tensors
        along = (slope * share * (1 - ctx.eps)).unsqueeze(-1)
        of_logits = softmax(logits).mul_(-along)
        return of_logits.scatter_add_(-1, index, along), None, None


def posterior(p: Tensor, column: Tensor) -> Tensor:
    """P(class | label, x) [..., C] from p [..., C] and the label's column [..., C]."""
    joint = p * column
    return joint / joint.sum(-1, keepdim=True)


def forward_losses(logits: Tensor, matrix: Tensor, y: Tensor) -> Tensor:
    """-log (p T)_y: logits [..., C] of the class, matrix [..., C, C] (those in front may be left out), y [...]."""
    columns = matrix.mT.expand(*y.shape, -1, -1)
    column = columns.gather(-2, y[..., None, None].expand(*y.shape, 1, logits.shape[-1])).squeeze(-2)
    return -(log_softmax(logits) + column.log()).logsumexp(-1)


def cross_correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """[N]: mean over pairs of columns, one of a [N, B, d] and one of b [N, B, e], of their squared correlation.

    weight [N, B] is 1 / size of the batch for samples that count, else 0. A constant column correlates with none.
    """
    first, second = _unit(a, weight), _unit(b, weight)
    if a.shape[1] < min(a.shape[2], b.shape[2]):  # the same sum, from smaller products
        squares = (first @ first.mT) * (second @ second.mT)
    else:
        squares = (first.mT @ second).square()
    return squares.sum((1, 2)) / (a.shape[2] * b.shape[2])


def _unit(columns: Tensor, weight: Tensor) -> Tensor:
    """Columns about their means, with length one over the samples that count."""
    share = weight[..., None]
    centred = (columns - (columns * share).sum(1, keepdim=True)) * share.sqrt()
    spread = centred.square().sum(1, keepdim=True)
    return centred * torch.where(spread > LEAST_VARIANCE, spread, torch.inf).rsqrt()


def policy_losses(reward: Tensor, baseline: Tensor, masks: Tensor, logits: Tensor) -> Tensor:
    """-(R - b) sum_f log P(m_f) [N, B], whose expected slope in the logits is that of -E[R].

    reward [N, B] of masks [N, B, F] in {0, 1}, drawn with logits [N, B, F]; baseline [N], which must not depend on them
    """
    log_probability = -F.binary_cross_entropy_with_logits(logits, masks, reduction="none").sum(-1)
    return -(reward - baseline[:, None]).detach() * log_probability


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Masks in {0, 1} [...]: 1 with probability sigmoid(logits), from numbers in [0, 1) of the same shape."""
    return (uniform < logits.detach().sigmoid()).to(logits.dtype)


def straight_through(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The same masks with the slope of sigmoid((logits + logit(1 - uniform)) / temperature), the relaxed ones."""
    noise = torch.logit(1 - uniform, eps=torch.finfo(uniform.dtype).eps)
    soft = ((logits + noise) / temperature).sigmoid()
    return drawn(logits, uniform) + (soft - soft.detach())


def entropy(logits: Tensor) -> Tensor:
    """Of masks with independent entries, in nats: [..., F] -> [...]."""
    each = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
    return each.sum(-1)
