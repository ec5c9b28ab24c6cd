"""What is known after an aggregation: who weighs how much, who lies where, and what was read."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVIATIONS = 3.0  # from the median distance, from where on a client looks like an outlier
NORMAL = 1.4826  # the standard deviation of normal numbers over their median absolute deviation
RESOLVED = 1e-6  # of the median distance: closer ones count as equal


class Certificate(NamedTuple):
    """Of a geometric median: (f(x) - f*) / f(x) is at most gap. tensor: its name, None for all of them as one."""

    tensor: str | None
    gap: float
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """An aggregation of N clients' T tensors.

    numbers       [T]              of each tensor, in all processes
    coefficients  [1 or T, N]      of the result, zero for dropped clients; None for rules of coordinates
    distances     [N]              from the result, over all float tensors; NaN for dropped clients, None if not asked
    pairwise      [N, N]           likewise
    dropped       client -> the first tensor in which it is not finite
    bytes_read    by all sweeps, of this process
    """

    method: str
    per_tensor: bool
    clients: tuple[str, ...]
    tensors: tuple[str, ...]
    numbers: tuple[int, ...]
    coefficients: Tensor | None
    distances: Tensor | None
    pairwise: Tensor | None
    certificates: tuple[Certificate, ...]
    dropped: dict[int, str]
    bytes_read: int
    seconds: float

    @property
    def weights(self) -> Tensor | None:
        """[N]: coefficients, of several tensors their mean by numbers held."""
        if self.coefficients is None or len(self.coefficients) == 1:
            return None if self.coefficients is None else self.coefficients[0]
        sizes = torch.tensor(self.numbers, dtype=torch.float64)
        return sizes @ self.coefficients / sizes.sum().clamp_min(1)

    @property
    def outliers(self) -> list[int]:
        """Clients that `outliers` names."""
        return [] if self.distances is None else outliers(self.distances).nonzero()[:, 0].tolist()

    def to_json(self) -> dict[str, Any]:
        """Every number; null for what is not known."""
        return {
            "method": self.method,
            "mode": "per-tensor" if self.per_tensor else "whole",
            "clients": list(self.clients),
            "weights": _list(self.weights),
            "distances": _list(self.distances),
            "pairwise": _list(self.pairwise),
            "outliers": [self.clients[i] for i in self.outliers],
            "dropped": {self.clients[i]: tensor for i, tensor in self.dropped.items()},
            "certificates": [certificate._asdict() for certificate in self.certificates],
            "weights_per_tensor": self._by_tensor(),
            "tensors": len(self.tensors),
            "numbers": sum(self.numbers),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }  # fmt: skip

    def _by_tensor(self) -> dict[str, list[float]] | None:
        if self.coefficients is None or not self.per_tensor:
            return None
        return dict(zip(self.tensors, self.coefficients.tolist(), strict=True))

    def to_text(self) -> str:
        """A table for a terminal."""
        far, weights, nearest = set(self.outliers), self.weights, None
        if self.pairwise is not None and len(self.clients) > 1:
            others = self.pairwise.nan_to_num(torch.inf).fill_diagonal_(torch.inf)
            nearest = torch.where(others.amin(1).isfinite(), others.amin(1), torch.nan)
        rows = [("client", "weight", "distance", "nearest", "")]
        for i, client in enumerate(self.clients):
            remark = "outlier" if i in far else ""
            if i in self.dropped:
                remark = f"dropped: {self.dropped[i]} is not finite"
            rows.append((client, _cell(weights, i), _cell(self.distances, i), _cell(nearest, i), remark))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2, 3)), row[4]]).rstrip()
            for row in rows
        ]
        mode = "each tensor by itself" if self.per_tensor else "all tensors as one vector"
        said = [f"{self.method}, {mode}: {sum(self.numbers)} numbers in {len(self.tensors)} tensors"]
        if self.certificates:
            worst = max(self.certificates, key=lambda certificate: certificate.gap)
            place = "" if worst.tensor is None else f" at worst, in {worst.tensor}"
            said.append(f"certificate: {worst.status}, within {worst.gap:.1e} of the least sum of distances{place}")
        rate = self.bytes_read / max(self.seconds, 1e-9)
        said.append(f"read {self.bytes_read / 1e9:.2f} GB in {self.seconds:.2f} s ({rate / 1e9:.1f} GB/s)")
        return "\n".join([*lines, "", *said])


def outliers(distances: Tensor) -> Tensor:
    """[N] bool: farther from the result than the median distance by 3 deviations, judged by the median deviation.

    distances   [N], NaN where not known
    """
    known = distances[distances.isfinite()]
    if not len(known):
        return torch.zeros_like(distances, dtype=torch.bool)
    middle = known.quantile(0.5)
    deviation = NORMAL * (known - middle).abs().quantile(0.5)
    return distances > middle + torch.maximum(DEVIATIONS * deviation, RESOLVED * middle)


def _cell(x: Tensor | None, i: int) -> str:
    return "–" if x is None or not x[i].isfinite() else f"{x[i].item():.4g}"


def _list(x: Tensor | None) -> list[Any] | None:
    """Nested lists with None where numbers are not finite, which JSON cannot say."""
    if x is None:
        return None
    return [_list(part) if part.ndim else part.item() if part.isfinite() else None for part in x]
