"""A perceptron with rectified hidden layers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.layout import Layout, Views, linear, uniform


class MLP:
    """Widths of inputs, hidden layers and classes: (64, 64, 10). The latents are the first hidden layer's outputs."""

    batch_statistics = False

    def __init__(self, widths: Sequence[int]) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be two or more positive numbers, got {list(widths)}")
        self.widths = tuple(widths)
        self.classes = widths[-1]
        self.layout = Layout({
            name: shape
            for i, (inputs, outputs) in enumerate(pairwise(widths))
            for name, shape in ((f"{i}.weight", (inputs, outputs)), (f"{i}.bias", (outputs,)))
        })  # fmt: skip
        self.flops = 2 * sum(a * b for a, b in pairwise(widths))

    def first(self, generator: torch.Generator) -> Tensor:
        parts = []
        for inputs, outputs in pairwise(self.widths):
            parts += [uniform((inputs * outputs,), inputs, generator), uniform((outputs,), inputs, generator)]
        return torch.cat(parts)

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        x = x.flatten(2)
        return (F.relu(linear(x, views["0.weight"], views["0.bias"])) if len(self.widths) > 2 else x), []

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        last = len(self.widths) - 2
        for i in range(1, last):
            latent = F.relu(linear(latent, views[f"{i}.weight"], views[f"{i}.bias"]))
        return linear(latent, views[f"{last}.weight"], views[f"{last}.bias"]), latent, []
