"""Gradients no longer than a limit: what wrong labels pull at most. arXiv 1211.5063

    g <- g min(1, limit / (||g|| + 1e-6))        ||g|| over all that is trained, in every step of every client

From its code   FNBench's `clipping`, FedAvg with torch's clip_grad_norm_ at 5.0, whose 1e-6 this is. Weight decay is
                added afterwards, as in torch.
Shared          federated/local.py takes the steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Visit

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping(FedAvg):
    """limit: of a gradient's norm."""

    limit: float = 5.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit}")

    def slope(self, visit: Visit, rows: Tensor, slopes: list[Tensor]) -> list[Tensor]:
        norm = torch.stack([slope.flatten(1).square().sum(1) for slope in slopes]).sum(0).sqrt()
        scale = (self.limit / (norm + EPS)).clamp_max(1)
        return [slope * scale.view(-1, *[1] * (slope.ndim - 1)) for slope in slopes]
