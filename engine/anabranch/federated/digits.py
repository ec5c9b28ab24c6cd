"""scikit-learn's 1797 handwritten digits, held by many clients."""

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES, PIXELS = 10, 64


class Digits(NamedTuple):
    """Pictures of 8 by 8 pixels in [0, 1], float32, and what they show, int64. C clients hold n of them each.

    x, y            [C, n, 64], [C, n]
    test_x, test_y  [M, 64], [M]        a quarter of all, which no client holds
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(clients: int, *, skew: float, generator: torch.Generator) -> Digits:
    """The digits, a quarter put aside and the rest dealt to clients; see `deal` for the skew.

    Raises ImportError that names the extra where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's: pip install 'anabranch[federated]'") from error
    pixels, labels = load(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=generator)
    test, rest = order.tensor_split([len(y) // 4])
    held = rest[deal(y[rest], clients, skew=skew, generator=generator)]
    return Digits(x[held], y[held], x[test], y[test])


def deal(y: Tensor, clients: int, *, skew: float, generator: torch.Generator) -> Tensor:
    """Indices [C, n] of the samples of each client, all of them as many, none twice.

    y     [M] labels
    skew  share of each client's samples that come from one stretch of them sorted by label; the rest is drawn from all
    """
    n = len(y) // clients if clients > 0 else 0
    if n < 1 or not 0 <= skew <= 1:
        raise ValueError(f"need 1 to {len(y)} clients and a skew in [0, 1], got {clients} and {skew}")
    order = torch.randperm(len(y), generator=generator)[: clients * n]
    alike = round(skew * n)
    sorted_part = order[: clients * alike]
    sorted_part = sorted_part[y[sorted_part].argsort(stable=True)].view(clients, alike)
    whose = torch.randperm(clients, generator=generator)  # no client is known by its digits
    return torch.cat([sorted_part[whose], order[clients * alike :].view(clients, n - alike)], 1)
