"""Who owns which samples.

    iid             shuffled and dealt out; clients differ by at most one sample
    shards:S        sorted by class, cut into S pieces for each client, which are dealt out
    dirichlet:A     of each class the shares of clients are drawn from a Dirichlet distribution; small A, unlike clients
    owners          as the data say
    resample:N      N samples for each client, drawn with replacement: more clients than data

Every sample has one owner, except under `resample`.

From FNBench's code (arXiv 2505.06684): shards; a client that holds M / K samples already gets none of further classes;
draws are repeated while a client has too few. Reconstructed here: it discards what does not divide evenly, here clients
differ by one; and where ten draws leave some client short, the largest hand over samples of theirs, so that this ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("iid", "shards", "dirichlet", "owners", "resample")
TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How samples are dealt out.

    amount    shards of a client, alpha of Dirichlet, or samples to draw
    minimum   samples that each client has at least
    """

    kind: str = "iid"
    amount: float = 0.0
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown partition {self.kind!r}; choose one of {list(KINDS)}")
        needs_amount, whole = self.kind not in ("iid", "owners"), self.kind != "dirichlet"
        is_good = 0 < self.amount < math.inf and (not whole or self.amount == int(self.amount))
        if (needs_amount and not is_good) or (not needs_amount and self.amount):
            wanted = f"{self.kind}:{'N' if whole else 'ALPHA'} above 0" if needs_amount else f"{self.kind} alone"
            raise ValueError(f"a partition is written {wanted}, got {self.kind}:{self.amount:g}")
        if self.minimum < 1:
            raise ValueError(f"every client needs at least one sample, got a minimum of {self.minimum}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" if self.amount else self.kind


def parse_partition(text: str, *, minimum: int = 1) -> Partition:
    """`iid`, `shards:5`, `dirichlet:0.5`, `owners`, `resample:20`."""
    kind, given, amount = text.partition(":")
    try:
        return Partition(kind=kind, amount=float(amount) if given else 0.0, minimum=minimum)
    except ValueError as error:
        raise ValueError(f"partition {text!r}: {error}") from error


def deal_out(
    partition: Partition, y: Tensor, clients: int, generator: torch.Generator, *, owners: Tensor | None = None
) -> Sequence[Tensor]:
    """[K] of [n_k] int64: the indices of samples that each client owns, rising unless they are resampled.

    y [M] the true labels · owners [M] whom the data say they belong to
    """
    M, K = len(y), clients
    if partition.kind == "resample":
        n = int(partition.amount)
        drawn: Sequence[Tensor] = torch.randint(0, M, (K * n,), generator=generator).split(n)
        return drawn
    if K < 1 or K * partition.minimum > M:
        raise ValueError(
            f"{M} samples are too few for {K} clients with at least {partition.minimum} each; resample:N draws with "
            "replacement"
        )
    if partition.kind == "dirichlet":
        owner = _dirichlet(y, K, partition, generator)
    elif partition.kind == "shards":
        owner = _shards(y, K, int(partition.amount), generator)
    elif partition.kind == "owners":
        owner = _given(owners, K)
    else:
        owner = torch.empty_like(y)
        owner[torch.randperm(M, generator=generator)] = torch.arange(M) % K
    counts = owner.bincount(minlength=K)
    if int(counts.min()) < partition.minimum:
        raise ValueError(
            f"partition {partition} gives some client {int(counts.min())} samples, fewer than {partition.minimum}"
        )
    owned: Sequence[Tensor] = owner.argsort(stable=True).split(counts.tolist())
    return owned


def _shards(y: Tensor, K: int, each: int, generator: torch.Generator) -> Tensor:
    whose = torch.arange(K).repeat_interleave(each)[torch.randperm(K * each, generator=generator)]
    sizes = torch.tensor([len(shard) for shard in y.tensor_split(K * each)])
    owner = torch.empty_like(y)
    owner[y.argsort(stable=True)] = whose.repeat_interleave(sizes)
    return owner


def _given(owners: Tensor | None, K: int) -> Tensor:
    if owners is None:
        raise ValueError("these data do not say who owns which samples; choose another partition")
    if int(owners.max()) + 1 != K:
        raise ValueError(f"these data belong to {int(owners.max()) + 1} clients, got clients {K}")
    return owners


def _dirichlet(y: Tensor, K: int, partition: Partition, generator: torch.Generator) -> Tensor:
    for _ in range(TRIES):
        owner = _draw(y, K, partition.amount, generator)
        if int(owner.bincount(minlength=K).min()) >= partition.minimum:
            return owner
    return _hand_over(owner, K, partition.minimum, generator)


def _draw(y: Tensor, K: int, alpha: float, generator: torch.Generator) -> Tensor:
    numbers = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
    owner, held = torch.empty_like(y), torch.zeros(K, dtype=torch.int64)
    order = torch.randperm(len(y), generator=generator)
    for c in range(int(y.max()) + 1):
        mine = order[y[order] == c]
        share = torch.from_numpy(numbers.standard_gamma(alpha, K)) * (held < len(y) / K)
        if float(share.sum()) == 0.0:  # of a tiny alpha all numbers may be 0: one client takes the class
            share[int(held.argmin())] = 1.0
        ends = (share.cumsum(0) / share.sum() * len(mine)).round().long()
        sizes = ends.diff(prepend=ends.new_zeros(1))
        owner[mine] = torch.arange(K).repeat_interleave(sizes)
        held += sizes
    return owner


def _hand_over(owner: Tensor, K: int, minimum: int, generator: torch.Generator) -> Tensor:
    """The largest client gives one of its samples to the smallest, until none has fewer than the minimum."""
    counts = owner.bincount(minlength=K)
    while int(counts.min()) < minimum:
        giver, taker = int(counts.argmax()), int(counts.argmin())
        theirs = (owner == giver).nonzero()[:, 0]
        owner[theirs[torch.randint(0, len(theirs), (1,), generator=generator)]] = taker
        counts[giver] -= 1
        counts[taker] += 1
    return owner
