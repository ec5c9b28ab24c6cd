"""Any method over any source, in one sweep or two, holding N^2 products and a tile.

1. Products of all pairs of clients, summed over tiles and processes; rows of coefficients from them (method.py). Left
   out where the coefficients are known beforehand. Around the base where there is one; else around the first client,
   and once more around the best if that one lies too far from the others.
2. The result, tile by tile. Clients whose coefficient is zero are not read.

Floats are aggregated. Of integers and booleans, which count and name things, each element is the lower median of those
sent: some client's own value, and no minority's choice.
"""

import time
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregate.method import Coordinates, Decision, decide, finish_of, over_rows, try_out
from anabranch.aggregate.report import Certificate, Report
from anabranch.aggregate.rules import squared_distances
from anabranch.aggregate.settings import AggregateMethod, AggregateOptions
from anabranch.aggregate.sources import Chosen, Source, Tile
from anabranch.common.tensor_file import Write
from anabranch_kernels.geometric_median.op import DTYPES, MAGNIFIED, centred_gram, combine, resolution
from anabranch_kernels.geometric_median.solve import magnification, recentre

Progress = Callable[[str, int, int], object]  # name of the sweep, bytes read in it, bytes that it will read


@torch.no_grad()
def aggregate_source(
    source: Source,
    method: AggregateMethod,
    write: Write,
    options: AggregateOptions,
    progress: Progress = lambda *_: None,
) -> Report:
    """One set of tensors from N clients', handed to `write(name, begin, values)` in pieces, maybe more than once.

    Raises ValueError for options that do not fit and for clients that are not finite; then what was written is void.
    """
    return _Job(source, method, write, options, progress).run()


class _Job:
    """One aggregation: which clients are left, and what was read so far."""

    def __init__(
        self, source: Source, method: AggregateMethod, write: Write, options: AggregateOptions, progress: Progress
    ) -> None:
        self.source, self.asked, self.write, self.options, self.progress = source, method, write, options, progress
        self.N, self.entries = len(source.clients), source.entries
        method.check(self.N)
        self.method = method.without([], self.N)
        try_out(method, self.N)
        self.kept = list(range(self.N))
        self.dropped: dict[int, str] = {}
        self.is_float = [entry.dtype in DTYPES for entry in self.entries]
        self.groups = len(self.entries) if options.per_tensor else 1
        self.bytes_read, self.start = 0, time.perf_counter()

    def run(self) -> Report:
        grams = self.products() if self.method.needs_products else None
        around = None
        while around is None:  # once, or once more without clients that had to go
            decisions = self.decide(grams)
            around = self.result(decisions)
        return self.report(decisions, grams, around)

    def sweep(self, name: str, chosen: Chosen, *, base: bool) -> Iterator[Tile]:
        base &= self.source.has_base
        sizes = [prod(entry.shape) * entry.dtype.itemsize for entry in self.entries]
        total = sum(size * (len(some) + base) for size, some in zip(sizes, chosen, strict=True) if some is not None)
        done = 0
        for tile in self.source.tiles(chosen, base=base):
            yield tile
            read = (len(tile.rows) + (tile.base is not None)) * tile.rows.shape[1] * tile.rows.element_size()
            self.bytes_read, done = self.bytes_read + read, done + read
            self.progress(name, done, total)

    def group(self, entry: int) -> int:
        return entry if self.options.per_tensor else 0

    def products(self) -> Tensor:
        """Gram matrices [G, n, n] of the clients that are left, one per tensor or one of all."""
        rows = None if self.method.around_base or self.source.has_base else [0] * self.groups
        grams, marks = self._products(rows, [True] * self.groups)
        left = self.leave_out(marks)
        grams = grams[:, left][:, :, left]
        if self.method.around_base:
            return grams
        weights = torch.tensor(self.method.weights or [1.0] * len(left), dtype=grams.dtype).expand(self.groups, -1)
        far = magnification(grams, weights) > MAGNIFIED
        if bool(far.any()):
            # The centre is far away, by chance or by malice. Around the best client all that differs can be told apart.
            again, _ = self._products(recentre(grams, weights)[0].tolist(), far.tolist())
            grams = torch.where(far[:, None, None], again, grams)
        return grams

    def _products(self, centres: list[int] | None, wanted: list[bool]) -> tuple[Tensor, Tensor]:
        """Gram matrices of the groups wanted, around the base or the given clients; marks of what is not finite."""
        n, T = len(self.kept), len(self.entries)
        grams, marks = torch.zeros(self.groups, n, n, dtype=torch.float64), self.no_marks()
        takes = [self.is_float[t] and wanted[self.group(t)] for t in range(T)]
        for tile in self.sweep("products", [self.kept if take else None for take in takes], base=centres is None):
            group = self.group(tile.entry)
            centre = tile.base if centres is None else tile.rows[centres[group]]
            gram = _gram(tile.rows, centre)
            marks[tile.entry, :n] += ~gram.diagonal().isfinite()
            marks[tile.entry, n] += tile.base is not None and not tile.base.isfinite().all()
            grams[group] += gram
        return self.total(grams, marks)

    def no_marks(self) -> Tensor:
        """[T, n + 2]: where the n clients that are left, the base and the result are not finite."""
        return torch.zeros(len(self.entries), len(self.kept) + 2, dtype=torch.float64)

    def total(self, grams: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Both over all processes, by one sum."""
        both = self.source.total(torch.cat([grams.flatten(), marks.flatten()]))
        return both[: grams.numel()].view_as(grams), both[grams.numel() :].view_as(marks) > 0

    def leave_out(self, marks: Tensor) -> list[int]:
        """Drop the marked clients, or raise; returns the places among those kept before of those that stay."""
        names = [*(self.source.clients[i] for i in self.kept), "the base", "the result, unlike the clients,"]
        places = [column.nonzero()[:, 0].tolist() for column in marks.T]
        first = [self.entries[place[0]].name if place else None for place in places]
        n = len(self.kept)
        if any(first[n:]) or (any(first) and self.options.non_finite == "raise"):
            named = "; ".join(f"{name} in {tensor}" for name, tensor in zip(names, first, strict=True) if tensor)
            raise ValueError(f"not finite: {named}. non-finite 'drop' leaves such clients out")
        self.dropped |= {client: tensor for client, tensor in zip(self.kept, first[:n], strict=True) if tensor}
        self.method = self.asked.without(sorted(self.dropped), self.N)
        left = [i for i in range(n) if first[i] is None]
        self.kept = [self.kept[i] for i in left]
        return left

    def decide(self, grams: Tensor | None) -> list[Decision]:
        """One decision for each group."""
        n = len(self.kept)
        grams = torch.zeros(1, n, n, dtype=torch.float64).expand(self.groups, n, n) if grams is None else grams
        resolutions = [resolution(e.dtype) if f else 0.0 for e, f in zip(self.entries, self.is_float, strict=True)]
        if not self.options.per_tensor:
            resolutions = [max(resolutions, default=0.0)]
        return [decide(self.method, gram, resolution=r) for gram, r in zip(grams, resolutions, strict=True)]

    def result(self, decisions: list[Decision]) -> Tensor | None:
        """The second sweep. Products [n, n] around the result, empty if not wanted; None if clients were dropped."""
        method, finish = self.method, finish_of(self.method)
        n = len(self.kept)
        measures = self.options.distances and (finish is not None or not method.needs_products)
        everyone = torch.ones(n, dtype=torch.bool)
        takes = [
            everyone if measures or not is_float else (decisions[self.group(t)].rows != 0).any(0)
            for t, is_float in enumerate(self.is_float)
        ]
        chosen = [[self.kept[i] for i in take.nonzero()[:, 0].tolist()] for take in takes]
        size = n if measures else 0
        gram, marks = torch.zeros(size, size, dtype=torch.float64), self.no_marks()
        for tile in self.sweep("result", chosen, base=method.around_base):
            t, take = tile.entry, takes[tile.entry]
            if not self.is_float[t]:
                self.write(self.entries[t].name, tile.begin, torch.from_numpy(lower_median(tile.rows.cpu().numpy())))
                continue
            if finish is not None and not method.needs_products:  # rules of coordinates refuse NaN
                wrong, wrong_base = _not_finite(tile.rows), tile.base is not None and not tile.base.isfinite().all()
                marks[t, :n][take] += wrong.cpu()
                marks[t, n] += wrong_base
                if wrong_base or wrong.any():
                    continue
            rows = decisions[self.group(t)].rows[:, take]
            values = _by_coordinate(tile, rows, finish) if finish is not None else _sum(tile, rows, method)
            if not values.isfinite().all():
                wrong = _not_finite(tile.rows)
                marks[t, :n][take] += wrong.cpu()
                marks[t, n + 1] += not wrong.any()
            if measures:
                around = _gram(tile.rows, values)
                gram += around
                marks[t, :n] += ~around.diagonal().isfinite()
            self.write(self.entries[t].name, tile.begin, values.cpu())
        gram, marks = self.total(gram, marks)
        if bool(marks.any()):
            self.leave_out(marks)
            return None
        return gram

    def report(self, decisions: list[Decision], grams: Tensor | None, around: Tensor) -> Report:
        """What is known in the end; zeros and NaN stand for dropped clients."""
        coefficients = distances = pairwise = None
        if finish_of(self.method) is None:
            coefficients = torch.zeros(self.groups, self.N, dtype=torch.float64)
            coefficients[:, self.kept] = torch.cat([decision.rows for decision in decisions])
        if grams is not None:
            pairwise = squared_distances(grams.sum(0)).sqrt()
        if grams is not None and coefficients is not None:
            a = coefficients[:, self.kept, None]
            Ka = grams @ a
            squared = grams.diagonal(dim1=1, dim2=2) - 2 * Ka[:, :, 0] + (a * Ka).sum((1, 2))[:, None]
            distances = squared.sum(0).clamp_min(0).sqrt()
        elif around.numel():
            distances = around.diagonal().sqrt()
            pairwise = squared_distances(around).sqrt() if pairwise is None else pairwise
        numbers = self.source.total(torch.tensor([prod(e.shape) for e in self.entries], dtype=torch.float64))
        each = self.options.per_tensor
        names = [e.name for e, f in zip(self.entries, self.is_float, strict=True) if f] if each else [None]
        judged = [d for d, f in zip(decisions, self.is_float, strict=True) if f] if each else decisions
        certificates = [
            Certificate(name, decision.gap, decision.status)
            for name, decision in zip(names, judged, strict=True)
            if decision.gap is not None and decision.status is not None
        ]
        return Report(
            method=self.asked.title,
            per_tensor=self.options.per_tensor,
            clients=tuple(self.source.clients),
            tensors=tuple(entry.name for entry in self.entries),
            numbers=tuple(int(number) for number in numbers),
            coefficients=coefficients,
            distances=None if distances is None else self._for_all(distances),
            pairwise=None if pairwise is None else self._for_all(self._for_all(pairwise).T),
            certificates=tuple(certificates),
            dropped=dict(sorted(self.dropped.items())),
            bytes_read=self.bytes_read,
            seconds=time.perf_counter() - self.start,
        )

    def _for_all(self, x: Tensor) -> Tensor:
        """[N, ...] from [n, ...], NaN for dropped clients."""
        wide = x.new_full((self.N, *x.shape[1:]), torch.nan)
        wide[self.kept] = x
        return wide


def _gram(rows: Tensor, centre: Tensor | None) -> Tensor:
    return centred_gram(rows[None], None if centre is None else centre[None])[0].double().cpu()


def _sum(tile: Tile, rows: Tensor, method: AggregateMethod) -> Tensor:
    """Centred, since coefficients as float32 do not sum to one exactly: at the base, or at the heaviest client."""
    if not len(tile.rows):  # nobody weighs anything
        return torch.zeros_like(tile.rows[:0].sum(0)) if tile.base is None else tile.base.clone()
    heaviest = method.needs_products and not method.around_base
    centre = tile.rows[int(rows[0].argmax())] if heaviest else tile.base
    return combine(tile.rows[None], rows.to(tile.rows.device), None if centre is None else centre[None])[0]


def _by_coordinate(tile: Tile, rows: Tensor, finish: Coordinates) -> Tensor:
    """The rule of coordinates over the points that `rows` [M, n] make of the clients', around the base if any."""
    points, wide = tile.rows, torch.float64 if tile.rows.dtype == torch.float64 else torch.float32
    if tile.base is not None:
        points = points.to(wide) - tile.base.to(wide)
    values = over_rows(points, rows, finish)
    if tile.base is not None:
        values = values.to(wide) + tile.base.to(wide)
    return values.to(tile.rows.dtype)


def lower_median(rows: NDArray[Any]) -> NDArray[Any]:
    """The (lower) median of each element of N arrays: what a minority sends cannot leave the range of the others'."""
    middle = (len(rows) - 1) // 2
    return np.asarray(np.partition(rows, middle, axis=0)[middle])


def _not_finite(rows: Tensor) -> Tensor:
    """Which rows [n] hold Inf or NaN. Sums tell; rows whose sum is not finite are looked at, as sums may overflow."""
    bad = ~rows.sum(1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32).isfinite()
    for i in bad.nonzero()[:, 0].tolist():
        bad[i] = not rows[i].isfinite().all()
    return bad
