"""Where the tensors of a network lie in a row of numbers, and what such networks have in common.

Clients of one architecture are rows [N, D]; a network is a function of such rows and of what each row sees. All that a
client trains or sends is then one row, and many clients are one computation. A row ends in statistics that are not
trained (batch normalisation's); they are aggregated like all else, as plain numbers.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Output(NamedTuple):
    """logits      [N, B, C]
    features    [N, B, d]       what the last layer reads
    latent      [N, B, F, ...]  what the lower part makes of the inputs: F factors
    statistics  [N, S]          new values of the end of the rows; None without any, and in evaluation
    """

    logits: Tensor
    features: Tensor
    latent: Tensor
    statistics: Tensor | None = None


Views = Mapping[str, Tensor]


class Network(Protocol):
    """A classifier of N rows, each for inputs of its own.

    classes           C
    layout            what a row [D] is made of
    flops             of a forward pass of one sample
    batch_statistics  a sample's output in training depends on its batch, so clients are trained one at a time
    """

    classes: int
    layout: "Layout"
    flops: int
    batch_statistics: bool

    def first(self, generator: torch.Generator) -> Tensor:
        """A row [D] to begin with."""
        ...

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        """The lower part: x [N, B, ...] -> latents [N, B, F, ...] of F factors, and new statistics [N, ...]."""
        ...

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The upper part: logits [N, B, C], features [N, B, d] and further statistics."""
        ...


def forward(network: Network, rows: Tensor, x: Tensor, *, training: bool = False, views: Views | None = None) -> Output:
    """Both parts: rows [N, D], x [N, B, ...]. `views` of the rows, if they are there already."""
    views = network.layout.views(rows) if views is None else views
    latent, below = network.encode(views, x, training=training)
    logits, features, above = network.decode(views, latent, training=training)
    statistics = [s.flatten(1) for s in (*below, *above)]
    return Output(logits, features, latent, torch.cat(statistics, 1) if statistics else None)


class Layout:
    """Names and shapes of the tensors of a row, one after another: first what is trained, then statistics.

    The last two that are trained are the last layer's, weight [d, C] and bias [C].
    """

    def __init__(self, trained: Mapping[str, Sequence[int]], statistics: Mapping[str, Sequence[int]] | None = None):
        self.head = tuple(trained)[-2:]
        self.shapes = {name: tuple(shape) for name, shape in (*trained.items(), *(statistics or {}).items())}
        self.tensors_trained, self.trained = len(trained), sum(map(prod, trained.values()))
        self.sizes = [prod(shape) for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """[N, *shape] of each tensor of rows [N, D]. One split, so that the gradient is put together once."""
        parts = rows.split(self.sizes, 1)
        return {
            name: part.unflatten(1, shape) if len(shape) > 1 else part
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def named(self, model: Tensor) -> dict[str, Tensor]:
        """The tensors of a model [W, D] by name; names of networks beyond the first begin with their number."""
        views = self.views(model)
        return {(f"{w}." if w else "") + name: value[w] for name, value in views.items() for w in range(len(value))}

    def model(self, named: Mapping[str, Tensor]) -> Tensor:
        """The other way round: [W, D]."""
        W = len(named) // len(self.shapes)
        rows = [[named[(f"{w}." if w else "") + name].flatten() for name in self.shapes] for w in range(W)]
        return torch.stack([torch.cat(row) for row in rows])

    def cut(self, rows: Tensor, parts: int) -> list[Tensor]:
        """What is trained of rows [N, D]: as one tensor, if that is all the `parts`, or each tensor for itself."""
        return [rows[:, : self.trained]] if parts == 1 else list(self.views(rows).values())[: self.tensors_trained]


def uniform(shape: Sequence[int], inputs: int, generator: torch.Generator) -> Tensor:
    """As torch.nn draws weights of linear and convolutional layers: within 1 / sqrt(inputs)."""
    values = torch.rand(*shape, generator=generator) * 2 - 1
    return values.div_(inputs**0.5)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, B, in], weight [N, in, out], bias [N, out] -> [N, B, out]."""
    if len(x) == 1:  # one product of matrices is faster than a batch of one
        return torch.addmm(bias.squeeze(0), x.squeeze(0), weight.squeeze(0)).unsqueeze(0)
    return torch.baddbmm(bias[:, None], x, weight)
