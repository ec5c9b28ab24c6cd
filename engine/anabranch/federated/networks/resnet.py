"""ResNet-18 for small pictures (He et al., arXiv 1512.03385, with a 3 x 3 stem and no pooling before the stages).

Group normalisation needs nothing but a picture. With batch normalisation the running means and variances are the end of
a row: they are sent and averaged like weights, and a client's group is itself alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.convolution import batch_norm, conv, first_values, group_norm
from anabranch.federated.networks.layout import Layout, Views, linear

STAGES = 4
NORMS = ("group", "batch")


class ResNet:
    """Pictures [channels, height, width]; stages of `width`, twice, four and eight times as many channels.

    blocks   of each stage, of two convolutions; (2, 2, 2, 2) is ResNet-18, (1, 1, 1, 1) ResNet-10
    norm     "group" (`groups` of channels) or "batch"

    The latents are the channels after the first stage.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        classes: int,
        *,
        wide: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        norm: str = "group",
        groups: int = 8,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if len(blocks) != STAGES or min(blocks) < 1 or wide % groups:
            raise ValueError(f"need {STAGES} stages of blocks and groups that divide {wide}, got {blocks} and {groups}")
        self.classes, self.norm, self.groups = classes, norm, groups
        self.batch_statistics = norm == "batch"
        self.blocks = [
            (f"{stage}.{i}", wide << max(0, stage - (i == 0)), wide << stage, 2 if i == 0 and stage else 1)
            for stage, count in enumerate(blocks)
            for i in range(count)
        ]
        trained: dict[str, Sequence[int]] = {"stem.weight": (wide, channels, 3, 3), **self._norm("stem", wide)}
        area = height * width
        self.flops = 2 * area * wide * channels * 9
        for name, inputs, outputs, stride in self.blocks:
            area //= stride * stride
            trained |= {f"{name}.a.weight": (outputs, inputs, 3, 3), **self._norm(f"{name}.a", outputs)}
            trained |= {f"{name}.b.weight": (outputs, outputs, 3, 3), **self._norm(f"{name}.b", outputs)}
            self.flops += 2 * area * outputs * (inputs + outputs) * 9
            if stride > 1:
                trained |= {f"{name}.short.weight": (outputs, inputs, 1, 1), **self._norm(f"{name}.short", outputs)}
                self.flops += 2 * area * outputs * inputs
        last = wide << STAGES - 1
        trained |= {"head.weight": (last, classes), "head.bias": (classes,)}
        scales = [name.removesuffix(".scale") for name in trained if name.endswith(".scale")]
        kept = {f"{n}.{what}": trained[f"{n}.scale"] for n in scales for what in ("mean", "variance")}
        self.layout = Layout(trained, kept if self.batch_statistics else None)

    def first(self, generator: torch.Generator) -> Tensor:
        return first_values(self.layout.shapes, generator)

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        statistics: list[Tensor] = []
        h = F.relu(self._normalise(conv(x, views, "stem"), views, "stem", training, statistics))
        return self._stages(views, h, training, statistics, lower=True), statistics

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        statistics: list[Tensor] = []
        features = self._stages(views, latent, training, statistics, lower=False).mean((3, 4))
        return linear(features, views["head.weight"], views["head.bias"]), features, statistics

    def _stages(self, views: Views, h: Tensor, training: bool, statistics: list[Tensor], *, lower: bool) -> Tensor:
        """The first stage, or all others."""
        for name, _, _, stride in self.blocks:
            if name.startswith("0.") != lower:
                continue
            y = conv(h, views, f"{name}.a", stride=stride)
            y = F.relu(self._normalise(y, views, f"{name}.a", training, statistics))
            y = self._normalise(conv(y, views, f"{name}.b"), views, f"{name}.b", training, statistics)
            if stride > 1:
                h = conv(h, views, f"{name}.short", stride=stride, padding=0)
                h = self._normalise(h, views, f"{name}.short", training, statistics)
            h = F.relu(h + y)
        return h

    def _norm(self, name: str, channels: int) -> dict[str, Sequence[int]]:
        return {f"{name}.scale": (channels,), f"{name}.shift": (channels,)}

    def _normalise(self, x: Tensor, views: Views, name: str, training: bool, statistics: list[Tensor]) -> Tensor:
        if self.norm == "group":
            return group_norm(x, views, name, self.groups)
        y, new = batch_norm(x, views, name, training=training)
        statistics += new
        return y
