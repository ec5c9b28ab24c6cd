"""How evenly tokens spread over the blocks of routed adapters, from the counts that balancing has anyway.

cv       standard deviation of a layer's counts over their mean: 0 when all blocks are picked alike, sqrt(G - 1)
         when one of G is picked alone
unused   share of a layer's blocks that no token picked
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.rank_lora import RankLora


class Usage(nn.Module):
    """Counts of each routed layer since the last entry and since the last layer by layer one; a checkpoint holds both.

    recent, window   [layers, G] int64, buffers
    """

    recent: Tensor
    window: Tensor

    def __init__(self, layers: Mapping[str, RankLora]) -> None:
        super().__init__()
        self.names = list(layers)
        counts = torch.stack([layer.counts for layer in layers.values()])
        for name in ("recent", "window"):
            self.register_buffer(name, torch.zeros_like(counts))

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """Counts [G] of one step, of all layers."""
        self.recent += torch.stack([counts[name] for name in self.names])

    def entry(self, *, whole: bool) -> dict[str, Any]:
        """The means over layers since the last entry; with `whole`, each layer since the last whole one too."""
        self.window += self.recent
        said: dict[str, Any] = {name: round(float(x.mean()), 4) for name, x in _spread(self.recent).items()}
        self.recent.zero_()
        if whole:
            spread = {name: x.tolist() for name, x in _spread(self.window).items()}
            said["usage"] = {
                layer: {"counts": counts, **{name: round(values[index], 4) for name, values in spread.items()}}
                for index, (layer, counts) in enumerate(zip(self.names, self.window.tolist(), strict=True))
            }
            self.window.zero_()
        return said


def _spread(counts: Tensor) -> dict[str, Tensor]:
    """cv and unused of counts [layers, G]; zero where there are none."""
    counts = counts.double()
    cv = counts.std(1, correction=0) / counts.mean(1).clamp(min=1e-9)
    return {"cv": cv, "unused": (counts == 0).double().mean(1)}
