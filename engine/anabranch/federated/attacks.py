"""What hostile clients send. They know all that honest ones send, and agree on it.

    honest [N, D]  ->  [f, D]     of updates; f hostile clients
    honest [N, L, C] logits       of distillation, class by class

All of them stay inside a server's checks of form: arrays are finite and of the right shape.
"""

from statistics import NormalDist

import torch
from torch import Tensor


def sign_flip(honest: Tensor, f: int, *, scale: float = 1.0) -> Tensor:
    """The honest mean, backwards and `scale` times as long."""
    return (-scale * honest.mean(0)).expand(f, -1)


def a_little_is_enough(honest: Tensor, f: int, *, z: float | None = None) -> Tensor:
    """The mean less z standard deviations in each coordinate: inside the crowd, and always to one side (ALIE,
    arXiv 1902.06156).

    z   None for the paper's: so far that the honest clients who lie farther out, with the hostile, are a majority
    """
    if z is None:
        N = len(honest) + f
        supporters = N // 2 + 1 - f
        share = (len(honest) - supporters) / len(honest)
        z = NormalDist().inv_cdf(min(max(share, 1e-3), 1 - 1e-3))
    return (honest.mean(0) - z * honest.std(0)).expand(f, -1)


def inner_product_manipulation(honest: Tensor, f: int, *, epsilon: float = 0.5) -> Tensor:
    """-epsilon times the mean, short enough to hide: all votes together point the wrong way where epsilon > (N - f) / f
    of the mean, and rules that choose single points step backwards ("Fall of Empires", arXiv 1903.03936)."""
    return sign_flip(honest, f, scale=epsilon)


def mimic(honest: Tensor, f: int) -> Tensor:
    """Copies of one honest update, the one farthest out along the direction in which they differ most: nothing to be
    seen, and its client counts f times more (arXiv 2006.09365)."""
    apart = (honest - honest.mean(0)).double()
    _, vectors = torch.linalg.eigh(apart @ apart.T)
    return honest[int(vectors[:, -1].abs().argmax())].expand(f, -1)


def gaussian(honest: Tensor, f: int, *, scale: float = 10.0, generator: torch.Generator) -> Tensor:
    """Noise about zero, `scale` times as long as the honest updates are on average."""
    noise = torch.randn(f, honest.shape[1], generator=generator, dtype=honest.dtype)
    lengths: Tensor = noise.norm(dim=1, keepdim=True)
    return noise / lengths * (scale * float(honest.norm(dim=1).mean()))


def constant(honest: Tensor, f: int, *, value: float = 1e30) -> Tensor:
    """One huge number everywhere."""
    return honest.new_full((f, honest.shape[1]), value)


def label_flip(y: Tensor, classes: int) -> Tensor:
    """Labels of data that honest training is then misled by: the last class for the first, and so on."""
    return classes - 1 - y


def logits_reordered(logits: Tensor) -> Tensor:
    """FDLA (arXiv 2401.03685), as reconstructed: confidences handed on by one rank, the first class becomes the last.

    The second most likely class wins with the confidence that the first had; which values occur stays the same.
    """
    values, order = logits.sort(-1, descending=True)
    return torch.empty_like(logits).scatter_(-1, order.roll(-1, -1), values)


def logits_peaked(logits: Tensor, *, peak: float) -> Tensor:
    """PCFDLA, as reconstructed: a wrong class, the second most likely, gets the probability `peak`; all others share
    the rest equally. The peak is chosen to look plausible."""
    if not 0 < peak < 1:
        raise ValueError(f"peak must be in (0, 1), got {peak}")
    C = logits.shape[-1]
    wrong = logits.topk(2, dim=-1).indices[..., 1:]
    rest = torch.full_like(logits, (1 - peak) / (C - 1))
    return rest.scatter_(-1, wrong, peak).log()


def logits_unknowing(logits: Tensor) -> Tensor:
    """A free rider's: every class is as likely."""
    return torch.zeros_like(logits)
