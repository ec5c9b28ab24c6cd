"""Two convolutions and two linear layers, for pictures of some tens of pixels a side."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.convolution import conv, first_values, max_pool
from anabranch.federated.networks.layout import Layout, Views, linear


class CNN:
    """Pictures [channels, height, width]; 3 x 3 convolutions of 32 and 64 channels, each pooled, and 128 features.

    The latents are the first convolution's channels.
    """

    batch_statistics = False

    def __init__(self, channels: int, height: int, width: int, classes: int, *, wide: int = 32, features: int = 128):
        if min(height, width) < 4:
            raise ValueError(f"pictures must be at least 4 pixels high and wide, got {height} x {width}")
        self.classes = classes
        area = height // 4 * (width // 4)
        self.layout = Layout({
            "0.weight": (wide, channels, 3, 3), "0.bias": (wide,),
            "1.weight": (2 * wide, wide, 3, 3), "1.bias": (2 * wide,),
            "2.weight": (2 * wide * area, features), "2.bias": (features,),
            "3.weight": (features, classes), "3.bias": (classes,),
        })  # fmt: skip
        first, second = height * width * channels * 9, height // 2 * (width // 2) * wide * 9
        self.flops = 2 * (wide * first + 2 * wide * second + 2 * wide * area * features + features * classes)

    def first(self, generator: torch.Generator) -> Tensor:
        return first_values(self.layout.shapes, generator)

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        return F.relu(max_pool(conv(x, views, "0", channels_last=True))), []

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        h = F.relu(max_pool(conv(latent, views, "1", channels_last=True))).flatten(2)
        features = F.relu(linear(h, views["2.weight"], views["2.bias"]))
        return linear(features, views["3.weight"], views["3.bias"]), features, []
