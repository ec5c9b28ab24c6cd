"""Any robust rule in the mean's place: a minority of bad clients then moves the model a little, however bad they are.

    w <- rule(w_1, ..., w_m)         of the m models of a round, each one vector

    RFA (arXiv 1912.13445)          Robust(method=AggregateMethod(rule="geometric-median"))
    median (arXiv 1803.01498)       rule="coordinate-median"; of an even m the mean of the middle two
    trimmed mean (the same paper)   rule="trimmed-mean", f=3
    Krum (arXiv 1703.02757)         rule="krum", f=3

and every other rule and step before it of aggregate/settings.py. The geometric median, the medoid and the mean weigh
clients by their samples; other rules take no weights, and behind bucketing no client is known any more. Rules that are
about updates see what clients changed.

From its code   FNBench's, each named here: RFA is `per_tensor=True, weighted=False`, so a client may weigh much in one
                tensor and nothing in another (and ten smoothed steps where this is exact). Its median is
                rule="lower-median", as torch.median. Its Krum sums over all others: rule="krum" with
                neighbours = m - 1, which is the client nearest to the mean. Its trimmed mean is
                rule="distance-trimmed-mean". f is int(0.3 m).
Reconstructed   `root` and `own` are the number of a client whose data the server trusts, which has to be in every
                cohort. For foolsgold the server keeps what each client changed in all rounds.
Shared          aggregate/job.py aggregates. Running statistics are numbers like all others.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from anabranch.aggregate.robust import aggregate_updates
from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.method import FedAvg, Replies, Tensors
from anabranch.federated.networks.layout import Network
from anabranch.federated.robust_mean import for_round, robust_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust(FedAvg):
    """method      without weights
    weighted    by samples, where the rule takes weights
    per_tensor  each tensor by itself, instead of all numbers of a client as one vector
    """

    method: AggregateMethod = field(default_factory=AggregateMethod)
    weighted: bool = True
    per_tensor: bool = False

    needs_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.method.weights is not None:
            raise ValueError("clients weigh what they own (`weighted`): leave out the method's weights")
        if self.method.rule == "foolsgold" and self.per_tensor:
            raise ValueError("foolsgold compares what whole models have gone through; leave out per_tensor")

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        if self.method.rule == "foolsgold":
            return {"history": torch.zeros(clients, network.layout.size)}
        sizes = network.layout.sizes if self.per_tensor else [network.layout.size]
        return {"sizes": torch.tensor(sizes)}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        """Raises ValueError as `robust_mean` does."""
        assert replies.models is not None
        models, base = replies.models[:, 0], server["model"][0]
        if self.method.rule == "foolsgold":
            method = for_round(self.method, replies, round, weighted=self.weighted)
            history = server["history"].index_add(0, replies.clients, models - base)
            update = aggregate_updates(models - base, method, history=history[replies.clients]).update
            return {**server, "model": (base + update)[None], "history": history}
        sizes = server["sizes"].tolist() if self.per_tensor else None
        made = robust_mean(self.method, models, base, replies, round, weighted=self.weighted, sizes=sizes)
        return {**server, "model": made[None]}
