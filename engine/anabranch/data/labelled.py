"""Samples with their classes, whatever they are: the one form in which classifiers get their data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {"vector": 2, "image": 4, "text": 2}  # dimensions of x
SPLIT_SEED = 0  # where data come without a test, a quarter of them is one, always the same


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """A classification task.

    name
    kind            "vector": x [M, D] float32 · "image": [M, channels, H, W] float32 · "text": [M, L] int64, word ids
                    with 0 where a text has ended
    x, y            [M, ...], [M] int64 in 0 .. C - 1; y is right as far as the data say
    test_x, test_y  [T, ...], [T]
    names           of the C classes
    given           what other sources, such as people, called the same samples: name -> [M] int64
    owners          [M] int64: the client that each sample came from, 0 .. K - 1, where the data say it
    """

    name: str
    kind: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    names: Sequence[str]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != KINDS[self.kind] or self.x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"{self.name}: samples of kind {self.kind!r} have {KINDS[self.kind]} dimensions, the same to learn "
                f"from and to be tested on; got {list(self.x.shape)} and {list(self.test_x.shape)}"
            )
        if self.classes < 2:
            raise ValueError(f"{self.name}: there must be two classes or more to tell apart, got {list(self.names)}")
        alike = {"test labels": (self.test_x, self.test_y), "labels": (self.x, self.y)}
        alike |= {f"labels {name!r}": (self.x, y) for name, y in self.given.items()}
        for what, (x, y) in alike.items():
            if not len(x) or y.shape != (len(x),) or int(y.min()) < 0 or int(y.max()) >= self.classes:
                raise ValueError(
                    f"{self.name}: {what} must be {len(x)} numbers from 0 to {self.classes - 1}, one a sample, and at "
                    f"least one; got shape {list(y.shape)}" + (f", {int(y.min())} to {int(y.max())}" if len(y) else "")
                )

    @property
    def classes(self) -> int:
        """C."""
        return len(self.names)


class Split(NamedTuple):
    """Samples to learn from and to be tested on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def split(x: Tensor, y: Tensor) -> Split:
    """A quarter of x [M, ...], y [M] put aside as a test, the same in every run."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order.tensor_split([len(y) // 4])
    return Split(x[rest], y[rest], x[test], y[test])
