"""Which clients' labels are wrong, how, and how often: groups of clients, in the order of their numbers.

    pairflip:0.4                  all clients, at one rate
    symmetric:0.0-0.4             rates that rise from client to client
    symmetric:0.6@half            the first half of the clients; the others stay clean
    symmetric:0-0.4@50,pairflip:0-0.4@50      fifty clients of each; @20% is a share of them
    clean  asymmetric:RATE  instance:RATE  human:NAME        and these kinds; `human` takes labels that the data bring

From FNBench's code (arXiv 2505.06684): client i of n in a group from a to b has the rate a + i (b - a) / n, which never
reaches b, and exactly int(n_k r_k) of its labels are flipped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.data.labelled import Labelled
from anabranch.labels import noise

KINDS = ("clean", "symmetric", "pairflip", "asymmetric", "instance", "human")
_GROUP = re.compile(
    r"(?P<kind>[a-z]+)(:(?P<what>[^@:]+))?(@((?P<half>half)|(?P<count>\d+)|(?P<percent>\d+(\.\d+)?)%))?"
)
_RATES = re.compile(r"(\d*\.?\d+)(?:-(\d*\.?\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Clients whose labels are wrong in one way.

    low, high    rates: those of the first client, and of one after the last
    people       name of the labels that people gave
    share        of all clients, or
    count        of them; None for both: all that follow
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    people: str = ""
    share: float | None = None
    count: int | None = None

    def size(self, clients: int) -> int:
        """Clients in the group, of all of them."""
        if self.count is not None:
            return self.count
        return clients if self.share is None else int(self.share * clients)


class Noisy(NamedTuple):
    """y      [M] int64     the labels that clients learn from
    rates  [K] float64   share of each client's labels that are wrong
    """

    y: Tensor
    rates: Tensor


def parse_groups(text: str) -> tuple[Group, ...]:
    """The groups of a text such as those above. ValueError says what is allowed."""
    return tuple(_parse(one.strip()) for one in text.split(","))


def _parse(text: str) -> Group:
    match = _GROUP.fullmatch(text)
    if match is None or match["kind"] not in KINDS:
        raise ValueError(
            f"noise is KIND:RATE, KIND:FROM-TO, human:NAME or clean, then perhaps @half, @COUNT or @SHARE%, with KIND "
            f"one of {list(KINDS)}; got {text!r}"
        )
    kind, what = match["kind"], match["what"] or ""
    low, high, rates = 0.0, 0.0, _RATES.fullmatch(what)
    if kind not in ("clean", "human"):
        if rates is None:
            raise ValueError(f"noise {text!r} needs a rate or a range of them, such as {kind}:0.4 or {kind}:0.0-0.4")
        low = float(rates[1])
        high = float(rates[2]) if rates[2] else low
        if not 0 <= low <= high <= 1:
            raise ValueError(f"rates of noise must rise within [0, 1], got {what!r} in {text!r}")
    elif bool(what) != (kind == "human"):
        raise ValueError(f"noise is human:NAME, or clean alone; got {text!r}")
    share = 0.5 if match["half"] else float(match["percent"]) / 100 if match["percent"] else None
    count = int(match["count"]) if match["count"] else None
    people = what if kind == "human" else ""
    return Group(kind=kind, low=low, high=high, people=people, share=share, count=count)


def make_noisy(groups: Sequence[Group], data: Labelled, owned: Sequence[Tensor], generator: torch.Generator) -> Noisy:
    """Labels of which some are wrong, each client's by its group's rule; clients that no group names stay clean.

    owned [K] of [n_k], disjoint. ValueError for groups of more clients than there are, and where samples are shared.
    """
    K, y = len(owned), data.y.clone()
    first = 0
    for group in groups:
        last = first + group.size(K) if group.share is not None or group.count is not None else K
        if last > K or first == last:
            raise ValueError(
                f"the groups of noise are of {K} clients in all, but one begins at {first} and ends at {last}"
            )
        _spoil(group, data, owned[first:last], y, generator)
        first = last
    wrong = [(y[one] != data.y[one]).double().mean() for one in owned]
    return Noisy(y, torch.stack(wrong))


def _spoil(group: Group, data: Labelled, owned: Sequence[Tensor], y: Tensor, generator: torch.Generator) -> None:
    C, n = data.classes, len(owned)
    rates = [group.low + i * (group.high - group.low) / n for i in range(n)]
    if group.kind == "human":
        if group.people not in data.given:
            raise ValueError(f"{data.name} has no labels {group.people!r}; it has {sorted(data.given) or 'none'}")
        mine = torch.cat(list(owned))
        y[mine] = data.given[group.people][mine]
    elif group.kind == "instance":
        if data.kind == "text":
            raise ValueError("instance noise follows a sample's numbers, which words do not have; choose another kind")
        mine = torch.cat(list(owned))
        of_each = torch.tensor(rates).repeat_interleave(torch.tensor([len(one) for one in owned]))
        y[mine] = noise.instance_dependent(data.x[mine], data.y[mine], of_each, C, generator).y
    elif group.kind != "clean":
        target = noise.lookalikes(data.names) if group.kind == "asymmetric" else noise.pairs(C)
        for one, rate in zip(owned, rates, strict=True):
            if group.kind == "symmetric":
                y[one] = noise.flip_symmetric(data.y[one], rate, C, generator)
            else:
                y[one] = noise.flip_to(data.y[one], rate, target, generator)
