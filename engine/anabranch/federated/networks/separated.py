"""A network whose features are divided into what says the class and what says how its label is spoiled.

    phi(x) = h [d]                 all of a base network below its last layer
    separation h -> [F]            logits of how likely each of F factors, consecutive features, is sensitive to noise
    g1((1 - m) h) -> [C]           the base's last layer, which reads what is resistant
    g2(m h) -> [C, C]              logits of a transition matrix; on its diagonal `near` is added

In evaluation m is 1 where a factor is more likely sensitive than not, so the logits are those of the class. The heads
that are added begin as zeros: no factor is divided off, and all samples have one transition, near the identity.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.federated.networks.layout import Layout, Network, Views, linear


class Parts(NamedTuple):
    """logits      [N, B, C]      of the class
    transition  [N, B, C, C]   logits of labels (column) of each class (row)
    resistant   [N, B, d]      (1 - m) h
    sensitive   [N, B, d]      m h
    """

    logits: Tensor
    transition: Tensor
    resistant: Tensor
    sensitive: Tensor


class Separated:
    """`base` with two heads more, whose tensors are the first of a row.

    factors  F at most; of d features ceil(d / F) are one
    near     a
    heads    numbers of a row that are the added heads'
    """

    def __init__(self, base: Network, *, factors: int, near: float) -> None:
        self.base, self.near = base, near
        self.classes, self.batch_statistics = base.classes, base.batch_statistics
        self.weight, self.bias = base.layout.head
        d, C = base.layout.shapes[self.weight]
        self.width = -(-d // min(d, factors))
        self.factors = -(-d // self.width)
        added: dict[str, Sequence[int]] = {
            "separation.weight": (d, self.factors), "separation.bias": (self.factors,),
            "transition.weight": (d, C * C), "transition.bias": (C * C,),
        }  # fmt: skip
        shapes, trained = list(base.layout.shapes.items()), base.layout.tensors_trained
        self.layout = Layout({**added, **dict(shapes[:trained])}, dict(shapes[trained:]))
        self.heads = self.layout.size - base.layout.size
        self.flops = base.flops + 2 * d * (self.factors + C * C)

    def first(self, generator: torch.Generator) -> Tensor:
        return torch.cat([torch.zeros(self.heads), self.base.first(generator)])

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        return self.base.encode(views, x, training=training)

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """In training the logits are those of the base: a method that trains the heads takes the features."""
        logits, features, statistics = self.base.decode(views, latent, training=training)
        if not training:
            resistant, _ = self.divide(features, (self.separate(views, features) > 0).to(features.dtype))
            logits = self.classify(views, resistant)
        return logits, features, statistics

    def parts(self, views: Views, features: Tensor, masks: Tensor) -> Parts:
        """What features [N, B, d] say when they are divided by masks [N, B, F]."""
        resistant, sensitive = self.divide(features, masks)
        return Parts(self.classify(views, resistant), self.transition(views, sensitive), resistant, sensitive)

    def separate(self, views: Views, features: Tensor) -> Tensor:
        """Logits [N, B, F] of each factor being sensitive: features [N, B, d]."""
        return linear(features, views["separation.weight"], views["separation.bias"])

    def divide(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - m) h and m h: features [N, B, d], masks [N, B, F]."""
        wide = masks if self.width == 1 else masks.repeat_interleave(self.width, -1)[..., : features.shape[-1]]
        return (1 - wide) * features, wide * features

    def classify(self, views: Views, resistant: Tensor) -> Tensor:
        """Logits [N, B, C] of the class, from features [N, B, d] of which the sensitive are zero."""
        return linear(resistant, views[self.weight], views[self.bias])

    def transition(self, views: Views, sensitive: Tensor) -> Tensor:
        """Logits [N, B, C, C] of labels (column) of each class (row), from features of which the resistant are zero."""
        C = self.classes
        near = self.near * torch.eye(C, dtype=sensitive.dtype).flatten()
        flat = linear(sensitive, views["transition.weight"], views["transition.bias"] + near)
        logits: Tensor = flat.unflatten(2, (C, C))
        return logits
