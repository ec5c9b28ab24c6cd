"""Labels that are learned together with the network, as logits t of one distribution a sample. PENCIL, arXiv 1903.07788

    r = softmax(z)   what the network says        s = softmax(t)   what the sample's label is thought to be
    L = KL(r || s) / C  +  alpha [sample is among the chosen] CE(s, y)  +  beta H(r) / C

The network follows s, never y: y holds on to s alone. t begins at `certainty` times the one-hot y.

Closed forms, with u = log r - log s, all sums over C:
    dL/dz = r ((u - <r, u>) - beta (log r - <r, log r>)) / C
    dL/dt = (s - r) / C + alpha [chosen] (s - onehot y)

Shared   federated/methods/fedelc.py and maskedoptim.py, which scale them as here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.labels.selection import smallest
from anabranch.labels.softmax import log_softmax, softmax


class Slopes(NamedTuple):
    """The loss of each sample and what it falls by.

    loss    [...]
    logits  [..., C]   dL/dz
    labels  [..., C]   dL/dt; each row sums to zero
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor


def slopes(logits: Tensor, labels: Tensor, y: Tensor, chosen: Tensor, *, alpha: float, beta: float) -> Slopes:
    """The loss above and its closed-form gradients; nothing is recorded for autograd.

    logits  [..., C]       z
    labels  [..., C]       t
    y       [...] int64    the labels as they were given
    chosen  [...] bool     samples whose learned label is held to the given one
    """
    C = logits.shape[-1]
    log_r, log_s = log_softmax(logits.detach()), log_softmax(labels.detach())
    r, s = log_r.exp(), log_s.exp()
    apart = log_r - log_s
    divergence = (r * apart).sum(-1, keepdim=True)
    entropy = -(r * log_r).sum(-1, keepdim=True)
    held = alpha * chosen.to(r.dtype).unsqueeze(-1)
    of_y = log_s.gather(-1, y.unsqueeze(-1))
    return Slopes(
        loss=((divergence + beta * entropy) / C - held * of_y).squeeze(-1),
        logits=r * ((apart - divergence) - beta * (log_r + entropy)) / C,
        labels=(s - r) / C + held * s.scatter_add(-1, y.unsqueeze(-1), torch.full_like(of_y, -1.0)),
    )


def first_labels(y: Tensor, classes: int, certainty: float) -> Tensor:
    """`certainty` times one-hot: y [...] int64 -> [..., C] float32."""
    return certainty * F.one_hot(y, classes).float()


def merged(labels: Tensor, logits: Tensor, certainty: float) -> Tensor:
    """Half of what the labels [..., C] say and half of what the network does, as new label logits."""
    return certainty * (softmax(labels) + softmax(logits)) / 2


def share_of_smallest(losses: Tensor, real: Tensor, share: float) -> Tensor:
    """Which samples of each batch have its int(share * size) smallest losses; of equal ones the first.

    losses  [N, B]
    real    [N, B] bool   samples that count; the others are never chosen
    returns [N, B] bool
    """
    return smallest(losses, real, (share * real.sum(1, keepdim=True).double()).long())
