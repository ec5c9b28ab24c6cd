"""FedExP: the server goes further than the mean where clients disagree. arXiv 2301.09604

    eta = max(1, sum_k p_k ||D_k||^2 / (2 (||D||^2 + eps)))        D_k: client k's update, D = sum_k p_k D_k
    w <- w + eta D

Equal updates give a ratio of 1/2, so eta = 1; m orthogonal ones of one length give eta = m / 2.

From the paper       eta, with equal weights of the clients, and eps. (It also suggests to judge the mean of the last
                     two models, since the last one swings; here the last one is the model.)
From its code        FNBench's has p_k by samples. It measures D_k from the model of round 0 in every round: eta is then
                     of the whole way so far, and w begins there each time. A bug, and not offered.
Reconstructed here   what is not trained (running statistics) takes the mean: a variance that is extrapolated can turn
                     negative.
Not robust           where updates are mostly noise they are nearly orthogonal and eta is large: with 40 % of digits'
                     labels moved down by one it came to 60.8 % where FedAvg came to 78.4 (20 clients, 30 rounds).
Shared               Replies.mean and Replies.lengths: nothing more than a mean is kept of the clients' models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.method import FedAvg, Replies, Tensors
from anabranch.federated.networks.layout import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class FedExP(FedAvg):
    """eps: added to ||D||^2, for when clients agree that nothing is to be changed."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        return {"trained": torch.tensor(network.layout.trained)}

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        trained = int(server["trained"])
        model = replies.mean.clone()
        update = replies.mean[:, :trained].double() - server["model"][:, :trained].double()
        eta = (replies.weights @ replies.lengths / (2 * (update.square().sum(1) + self.eps))).clamp_min(1)
        model[:, :trained] += (eta - 1)[:, None] * update
        return {**server, "model": model}
