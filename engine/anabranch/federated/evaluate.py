"""How good a network is: on a test that no client has."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.layout import Network, forward

BATCH = 256  # samples in a pass; more gain nothing, and pictures' features would fill the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """accuracy, and macro averages over the classes of precision, recall and F1, 0 where a class is never named;
    loss in nats.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    loss: float


@torch.no_grad()
def look(network: Network, row: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [M, C] and features [M, d] of the network of a row [D] for x [M, ...]."""
    parts = [forward(network, row[None], part[None]) for part in x.split(BATCH)]
    return torch.cat([out.logits[0] for out in parts]), torch.cat([out.features[0] for out in parts])


def predict(network: Network, row: Tensor, x: Tensor) -> Tensor:
    """The logits alone."""
    return look(network, row, x)[0]


def spectrum(features: Tensor) -> Tensor:
    """[d] float64: singular values of the covariance of features [M, d], falling; under wrong labels they fall faster.

    The diagnosis of FNBench, arXiv 2505.06684.
    """
    values: Tensor = torch.linalg.svdvals(features.double().T.cov().view(features.shape[1], -1))
    return values


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of a spectrum's shares: in how many directions features vary. 0 where they do not vary.

    Roy and Vetterli, EUSIPCO 2007.
    """
    shares = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp()) if float(spectrum.sum()) > 0 else 0.0


def score(logits: Tensor, y: Tensor) -> Scores:
    """Logits [M, C] against y [M]."""
    from sklearn.metrics import precision_recall_fscore_support

    named = logits.argmax(1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        y.numpy(), named.numpy(), labels=range(logits.shape[1]), average="macro", zero_division=0
    )
    return Scores(
        accuracy=float((named == y).double().mean()), precision=float(precision), recall=float(recall), f1=float(f1),
        loss=float(F.cross_entropy(logits.double(), y)),
    )  # fmt: skip


def confusion(logits: Tensor, y: Tensor) -> Tensor:
    """[C, C] int64: how many samples of each class (row) were named as each (column)."""
    C = logits.shape[1]
    return (y * C + logits.argmax(1)).bincount(minlength=C * C).view(C, C)
