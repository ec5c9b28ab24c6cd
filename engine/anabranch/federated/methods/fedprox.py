"""FedProx: a spring from each client's model to the one it was sent. arXiv 1812.06127

    loss + mu/2 ||w - w_sent||^2

What the spring adds to the slope, mu (w - w_sent), is known and costs no pass of its own.

From the paper   the squared norm; the paper also lets clients stop early, which here a schedule does for all.
From its code    FNBench's takes mu/2 ||w_l - w_sent,l|| of each tensor l, not squared: a pull of length mu/2 on every
                 tensor, however near it is. `squared=False` is that; where nothing has moved yet it pulls nowhere.
Shared           federated/local.py takes the steps. What is not trained (running statistics) is not pulled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit


@dataclass(frozen=True, slots=True, kw_only=True)
class FedProx(FedAvg):
    """mu: of the spring. squared: False for a pull of the same length at any distance, tensor by tensor."""

    mu: float = 0.1
    squared: bool = True

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"mu must not be negative, got {self.mu}")

    def slope(self, visit: Visit, rows: Tensor, slopes: list[Tensor]) -> list[Tensor]:
        layout = visit.network.layout
        apart, pull = rows - visit.received, self.mu
        if not self.squared:
            directions = [
                part.flatten(1) / part.flatten(1).norm(dim=1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
                for part in layout.views(apart).values()
            ]
            apart, pull = torch.cat(directions, 1), self.mu / 2
        return [slope.add(part, alpha=pull) for slope, part in zip(slopes, layout.cut(apart, len(slopes)), strict=True)]
