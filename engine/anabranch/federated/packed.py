"""The samples of a group of clients side by side, and the order in which each goes through its own."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.federated.streams import Streams

EPOCH = 1 << 16  # steps of an epoch, at most: batches are numbered by it


class Packed(NamedTuple):
    """Samples of N clients, each row filled up to the longest with its first sample.

    source  [M, ...]        samples of all
    owned   [N, n] int64    which of these are a client's
    y       [N, n] int64    the labels they learn from
    counts  [N] int64       how many of a row are a client's own
    """

    source: Tensor
    owned: Tensor
    y: Tensor
    counts: Tensor

    @property
    def x(self) -> Tensor:
        """[N, n, ...], copied."""
        return _take(self.source, self.owned)

    @property
    def real(self) -> Tensor:
        """[N, n] bool: not filled up."""
        return torch.arange(self.y.shape[1]) < self.counts[:, None]


class Batch(NamedTuple):
    """What each of N clients looks at in one step; where a client has fewer samples, some count nothing.

    x       [N, B, ...]
    y       [N, B] int64
    which   [N, B] int64     which of the client's samples they are
    weight  [N, B] float32   1 / size of the client's batch, or 0: sums of losses times these are means
    live    [N] bool         whether the client takes this step at all
    number  tells this step from all others of the visit, whoever is trained beside
    """

    x: Tensor
    y: Tensor
    which: Tensor
    weight: Tensor
    live: Tensor
    number: int

    @property
    def real(self) -> Tensor:
        """[N, B] bool: samples that count."""
        return self.weight > 0

    def take(self, values: Tensor) -> Tensor:
        """[N, B, ...] of these samples, of what is known of all, values [N, n, ...]."""
        return values[torch.arange(len(values))[:, None], self.which]

    def put(self, values: Tensor, new: Tensor, turn: Tensor | None = None) -> None:
        """Write new [N, B, ...] of those samples that count into values [N, n, ...].

        turn  [N, B] int64   values are [N, n, q, ...] then, and this is the entry of q to write
        """
        index: tuple[Tensor, ...] = (torch.arange(len(values))[:, None], self.which)
        if turn is not None:
            index = (*index, turn)
        real = self.real
        if not real.all():
            new = torch.where(real.view(*real.shape, *[1] * (new.ndim - 2)), new, values[index])
        values[index] = new


def pack(x: Tensor, y: Tensor, owned: list[Tensor]) -> Packed:
    """The samples x [M, ...], y [M] of clients that own some of them each, owned [N] of indices [n_i], n_i >= 1."""
    counts = torch.tensor([one.numel() for one in owned])
    place = torch.arange(int(counts.max()))
    place = torch.where(place < counts[:, None], place, 0) + (counts.cumsum(0) - counts)[:, None]
    index = torch.cat(owned)[place]
    return Packed(x, index, y[index], counts)


def subset(data: Packed, chosen: Tensor) -> Packed:
    """The samples chosen [N, n] bool, at least one of each client; their order is kept."""
    counts = chosen.sum(1)
    order = (~chosen).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    index = torch.where(torch.arange(order.shape[1]) < counts[:, None], order, order[:, :1])
    return Packed(data.source, data.owned.gather(1, index), data.y.gather(1, index), counts)


def with_samples(data: Packed, x: Tensor) -> Packed:
    """The same clients with other samples x [N, n, ...] in the places of theirs, such as their features."""
    return data._replace(source=x.flatten(0, 1), owned=torch.arange(data.y.numel()).view_as(data.y))


def shuffled(data: Packed, streams: Streams, number: int, *, size: int, drop_last: bool) -> tuple[Tensor, Tensor]:
    """The order [N, longest] in which clients take their samples in an epoch, and how many [N] they take; see epoch."""
    order = streams.order(data.counts, data.y.shape[1], number)
    counts = data.counts - data.counts % size * (data.counts >= size) if drop_last else data.counts
    return order[:, : int(counts.max())], counts


def epoch(data: Packed, streams: Streams, number: int, *, size: int, drop_last: bool) -> Iterator[Batch]:
    """The batches of one epoch, each sample once, in an order of the client's own.

    number     of the epoch
    drop_last  leave out what does not fill a batch, but for clients whose samples fill none
    """
    order, counts = shuffled(data, streams, number, size=size, drop_last=drop_last)
    longest = order.shape[1]
    sizes = (counts[:, None] - torch.arange(0, longest, size)).clamp(0, size)  # [N, steps]
    real = torch.arange(longest) < counts[:, None]
    weight = real / sizes.clamp_min(1).repeat_interleave(size, 1)[:, :longest]
    # The pieces of all batches at once: a call for each tensor, not for each batch.
    parts = (values.split(size, 1) for values in (data.owned.gather(1, order), data.y.gather(1, order), order, weight))
    for i, (index, y, which, weight, live) in enumerate(zip(*parts, (sizes > 0).unbind(1), strict=True)):
        yield Batch(_take(data.source, index), y, which, weight, live, number * EPOCH + i)


def _take(source: Tensor, which: Tensor) -> Tensor:
    """source [M, ...], which [N, n] -> [N, n, ...]."""
    return source.index_select(0, which.flatten()).view(*which.shape, *source.shape[1:])
