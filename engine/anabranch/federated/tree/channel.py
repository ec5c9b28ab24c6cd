"""What crosses the links of a tree: samples as their embeddings, their labels, and predictions. Nothing else passes."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

# What may cross, and of which dtype: so many samples, each so many numbers.
KINDS = {"embeddings": torch.float32, "labels": torch.int32, "predictions": torch.float32}


class Crossing(NamedTuple):
    """kind   one of KINDS
    child  the lower node of the link
    up     towards the root
    """

    kind: str
    child: int
    up: bool


class Channel:
    """Every link of a tree; counts the bytes that cross each.

    classes    numbers of a prediction
    embedding  numbers of an embedding
    """

    def __init__(self, classes: int, embedding: int) -> None:
        self._sizes = {"embeddings": embedding, "labels": 1, "predictions": classes}
        self.bytes: Counter[Crossing] = Counter()

    def send(self, kind: str, child: int, values: Tensor, *, up: bool) -> Tensor:
        """What arrives of values [n, size]. ValueError for what must not cross."""
        if kind not in KINDS:
            raise ValueError(f"only {list(KINDS)} cross a link, got {kind!r}")
        if values.ndim != 2 or values.shape[1] != self._sizes[kind] or values.dtype != KINDS[kind]:
            raise ValueError(
                f"{kind} must be [n, {self._sizes[kind]}] {KINDS[kind]}, got {list(values.shape)} {values.dtype}"
            )
        self.bytes[Crossing(kind, child, up)] += values.nbytes
        return values.detach().clone()

    def take(self) -> "Counter[Crossing]":
        """What has crossed since the last time."""
        taken, self.bytes = self.bytes, Counter()
        return taken
