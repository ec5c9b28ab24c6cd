"""The adapters on the device: pools of ranks beside every matrix product, and what adds them to its outputs.

A product that computes P linear layers of D inputs and O outputs in all has a pool of R ranks: a [P, R, D], b [R, O],
and for adapters with routers router [P, R, D] and bias [P, R]. An adapter has the same run of ranks in all pools
(slots.py says which), and the rows of its routers begin where its ranks do. Nothing is written until an adapter comes:
on a CPU untouched pages cost nothing.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anabranch.adapters.attach import Place, replace_module
from anabranch.adapters.packed import Packed
from anabranch.models.transformer import Transformer
from anabranch.serve.adapters.slots import Load
from anabranch_kernels.rank_lora.op import GATES, FusedAdapters

FIRST_SLOTS = 8  # rows of the tables at first; they double


class Sizes(NamedTuple):
    """Most of any layer: blocks that a token picks, ranks it uses, blocks, ranks. As the op's Table has them."""

    chosen: int = 0
    active: int = 0
    rows: int = 0
    ranks: int = 0


def bytes_per_rank(places: Mapping[str, Place]) -> int:
    """That one rank takes in all linear layers, with a router."""
    return sum((2 * w.shape[1] + w.shape[0]) * w.itemsize + 4 for w in (place.weight for place in places.values()))


class AdaptedProduct(nn.Module):
    """A matrix product with what the adapters of the running step add to it."""

    def __init__(self, base: nn.Module, arena: "AdapterArena") -> None:
        super().__init__()
        self.base = base
        self.arena = arena
        self.adapters: FusedAdapters | None = None  # none resident has one here

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.adapters is not None and self.arena.adapter_of is not None:
            self.adapters.add_to(out, x, self.arena.adapter_of)
        return out


class Pool:
    """Beside one product: the tensors, their tables, and which layers adapters have in use.

    names     of the P linear layers, in the order of their columns
    columns   where each begins and, last, where all end
    """

    def __init__(self, names: list[str], columns: list[int], like: Tensor, ranks: int) -> None:
        self.names, self.columns = names, columns
        P, D, O = len(names), like.shape[1], columns[-1]
        self.a = like.new_empty(P, ranks, D)
        self.b = like.new_empty(ranks, O)
        self.router = like.new_empty(P, ranks, D)
        self.bias = like.new_empty(P, ranks, dtype=torch.float32)
        self.places = torch.zeros(P, FIRST_SLOTS, 6, dtype=torch.int32, device=like.device)
        self.scales = torch.zeros(P, FIRST_SLOTS, device=like.device)
        self.users: dict[int, tuple[bool, ...]] = {}  # by slots: the layers that each adapter has

    def put(self, slot: int, first: int, weights: Mapping[str, Packed]) -> None:
        """Copy an adapter to its ranks and write its row of the tables."""
        places, scales = torch.zeros(len(self.names), 6, dtype=torch.int32), torch.zeros(len(self.names))
        for p, (name, (begin, end)) in enumerate(zip(self.names, pairwise(self.columns), strict=True)):
            packed = weights.get(name)
            if packed is None:
                continue
            place, a, b, router, bias = packed
            ranks, rows = slice(first, first + place.ranks), slice(first, first + place.rows)
            self.a[p, ranks].copy_(a)
            self.b[ranks, begin:end].copy_(b)
            if place.rows:
                self.router[p, rows].copy_(router)
                self.bias[p, rows].copy_(bias)
            numbers = [first, place.ranks, first, place.rows, place.chosen, GATES.index(place.gate)]
            places[p], scales[p] = torch.tensor(numbers, dtype=torch.int32), place.scale
        while slot >= self.places.shape[1]:
            self.places = torch.cat([self.places, torch.zeros_like(self.places)], 1)
            self.scales = torch.cat([self.scales, torch.zeros_like(self.scales)], 1)
        self.places[:, slot].copy_(places)
        self.scales[:, slot].copy_(scales)
        self.users[slot] = tuple(name in weights for name in self.names)

    def drop(self, slot: int) -> None:
        """A slot that is free again."""
        self.places[:, slot].zero_()
        del self.users[slot]

    def fused(self, sizes: Sizes) -> FusedAdapters | None:
        """As the op takes them; None if no adapter has any of these layers."""
        used = [any(has) for has in zip(*self.users.values(), strict=True)]
        parts = tuple(
            number
            for p, (begin, end) in enumerate(pairwise(self.columns))
            if used and used[p]
            for number in (p, begin, end)
        )
        if not parts:
            return None
        return FusedAdapters(
            a=self.a, b=self.b, router=self.router, bias=self.bias, places=self.places, scales=self.scales,
            parts=parts, sizes=sizes,
        )  # fmt: skip


class AdapterArena:
    """The pools of a model of which `places` are the linear layers; its products use them from now on.

    adapter_of   [T] int32: slots of the tokens of the step that runs, -1 for none; None if no token has an adapter, and
                 then the model runs as it did without an arena
    """

    def __init__(self, model: Transformer, places: Mapping[str, Place], *, ranks: int) -> None:
        self.ranks = ranks
        self.adapter_of: Tensor | None = None
        self._sizes: dict[int, Sizes] = {}  # by slots
        self._pools: list[tuple[AdaptedProduct, Pool]] = []
        for path, names in _products(places).items():
            product = AdaptedProduct(model.get_submodule(path), self)
            columns = [0]
            for name in names:
                columns.append(columns[-1] + len(places[name].weight))
            self._pools.append((product, Pool(names, columns, places[names[0]].weight, ranks)))
            replace_module(model, path, product)

    def load(self, load: Load) -> None:
        """Put an adapter at its place. Between two steps only."""
        for slot in load.freed:
            del self._sizes[slot]
        self._sizes[load.slot] = _sizes(load.adapter.weights)
        sizes = Sizes(*map(max, zip(*self._sizes.values(), strict=True)))
        for product, pool in self._pools:
            for slot in load.freed:
                pool.drop(slot)
            pool.put(load.slot, load.first_rank, load.adapter.weights)
            product.adapters = pool.fused(sizes)


def _products(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The products by their names in the model, and the linear layers of each in the order of their columns."""
    products: dict[str, list[str]] = {}
    for name, place in sorted(places.items(), key=lambda item: 0 if item[1].columns is None else item[1].columns.start):
        products.setdefault(place.module, []).append(name)
    return products


def _sizes(weights: Mapping[str, Packed]) -> Sizes:
    places = [packed.place for packed in weights.values()]
    return Sizes(*map(max, zip(*((p.chosen, p.active, p.rows, p.ranks) for p in places), strict=True)))
