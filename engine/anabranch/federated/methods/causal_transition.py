"""Causal transition matrix: labels that a sample's own features spoil, seen through what is sensitive. arXiv 2412.13516

    h = phi(x), m_f ~ Bernoulli(pi_f), pi = sigmoid(s(h))        m_f = 1: factor f of the features is sensitive
    p = softmax(g1((1 - m) h))                                   the class
    T = (1 - eps) softmax_rows(g2(m h) + a I) + eps / C          T_ij: class i is labelled j; q = p T
    L = -log q_y + [i in S] (-log p_y / |S| - lambda_T log T_yy / |S|) + lambda_d R + lambda_p L_pg - lambda_h H(pi)
        S     the (1 - f(t)) B smallest -log p_y of a batch, by the other of two networks
        R     mean squared correlation of (1 - m) h with m h
        L_pg  -(r - b) sum_f log P(m_f), r = log q_y + [i in S] log p_y - kappa mean m, b the mean r so far (decay 0.9)

In the first `warm_up` rounds L = -log p_y with m = 1/2, and the heads s and g2 stay as they are. Both networks predict
together, by their mean p with m = [pi > 1/2], never by q. Time counts rounds.

From the paper       that T depends on x through its noise-sensitive part alone, the separation of both parts, the
                     transition model, co-teaching, the policy gradient, the decorrelation (abstract and summaries).
Reconstructed here   all formulas, numbers and networks: neither the full text nor code could be had. H is a sum over
                     factors, so a factor that is worth D more in r when it is sensitive ends near
                     pi = sigmoid(lambda_p D / lambda_h). s learns from L_pg and H alone, not through phi.
Federated            is ours, too: phi and g1 are shared. With `local` a client goes on with its own s and g2, as
                     annotators differ; the model's are their mean, with which newcomers begin and the test is
                     predicted. A single client's mean is its own: then `local` changes nothing.
Shared               labels/transition.py and labels/selection.py have the mathematics, networks/separated.py the heads.

Ablations   estimator="straight-through" · anchor=0 (no L_T) · decorrelation=0 · local=False
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anabranch.federated.method import PIECE, FedAvg, Replies, Tensors, Visit, batch_mean, cross_entropy
from anabranch.federated.methods.coteaching import peers
from anabranch.federated.networks.layout import Network
from anabranch.federated.networks.separated import Separated
from anabranch.federated.packed import Batch, Packed
from anabranch.federated.streams import Purpose
from anabranch.labels import transition
from anabranch.labels.selection import forget_rate, mean_of, small_losses
from anabranch.labels.softmax import softmax

DECAY = 0.9  # of the mean reward
WARM, COLD = 1.0, 0.3  # temperatures of relaxed masks, from the end of warming up to the last round


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalTransition(FedAvg):
    """warm_up        rounds of plain training
    forget, ramp   share of the samples left out of S in the end, about that of the wrong labels; rounds until then
    factors        F, consecutive features each
    near, eps      a and the least entry of T, times C
    anchor         lambda_T
    decorrelation  lambda_d
    policy         lambda_p
    entropy        lambda_h
    kappa          what it costs to call all factors sensitive
    estimator      "reinforce", or "straight-through": masks have the slope of relaxed ones
    local          clients keep heads s and g2 of their own
    """

    networks: ClassVar[int] = 2

    warm_up: int = 10
    forget: float = 0.2
    ramp: int = 10
    factors: int = 16
    near: float = 4.0
    eps: float = 1e-3
    anchor: float = 0.1
    decorrelation: float = 0.1
    policy: float = 1.0
    entropy: float = 0.01
    kappa: float = 0.1
    estimator: Literal["reinforce", "straight-through"] = "reinforce"
    local: bool = True

    def __post_init__(self) -> None:
        if self.warm_up < 0 or self.ramp < 0 or self.factors < 1:
            raise ValueError(
                f"need warm_up, ramp >= 0 and factors >= 1, got {self.warm_up}, {self.ramp} and {self.factors}"
            )
        if not 0 <= self.forget < 1 or not 0 < self.eps < 1:
            raise ValueError(f"need forget in [0, 1) and eps in (0, 1), got {self.forget} and {self.eps}")
        weights = {name: getattr(self, name) for name in ("anchor", "decorrelation", "policy", "entropy", "kappa")}
        if min(weights.values()) < 0:
            raise ValueError(f"weights must not be negative, got {weights}")

    def network(self, base: Network) -> Separated:
        return Separated(base, factors=self.factors, near=self.near)

    def vote(self, logits: Tensor) -> Tensor:
        """The logarithm of the mean p: [2, T, C] -> [1, T, C]."""
        return logits.softmax(-1).mean(0, keepdim=True).log()

    def first(self, network: Network, clients: int) -> dict[str, Tensor]:
        """diagonal [K], mean T_ii of a client's samples, and sensitive [K], mean pi, at its latest visit; transition
        [C, C], T by class, of the latest cohort.
        """
        C = network.classes
        T_ii = float(transition.transition(self.near * torch.eye(C), self.eps)[0, 0])
        known = {"diagonal": torch.full((clients,), T_ii), "sensitive": torch.full((clients,), 0.5)}
        return {**known, "transition": torch.eye(C)}

    def fresh(self, network: Network, data: Packed) -> dict[str, Tensor]:
        """steps [N] int64 after warming up, reward [N, 2], the sum that the mean r is made of, heads [N, 2, H]."""
        assert isinstance(network, Separated)
        N = len(data.y)
        steps, heads = torch.zeros(N, dtype=torch.int64), torch.zeros(N, 2, network.heads if self.local else 0)
        return {"steps": steps, "reward": torch.zeros(N, 2), "heads": heads}

    def begin(self, visit: Visit, rows: Tensor) -> None:
        own = visit.kept["heads"].transpose(0, 1).flatten(0, 1)
        been = (visit.kept["steps"] > 0).repeat(2)
        rows[:, : own.shape[1]] = torch.where(been[:, None], own, rows[:, : own.shape[1]])

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        network = visit.network
        assert isinstance(network, Separated)
        h, views = visit.see(rows, batch.x).features, visit.views(rows)
        if visit.round < self.warm_up:
            return batch_mean(cross_entropy(network.classify(views, h / 2), batch.y), batch)
        s = network.separate(views, h.detach())
        m = self.masks(visit, s, batch)
        logits, T_logits, resistant, sensitive = network.parts(views, h, m)
        y, weight = batch.y.repeat(2, 1), batch.weight.repeat(2, 1)
        column = transition.label_column(T_logits, y, self.eps)
        log_q = (softmax(logits) * column).sum(-1).log()
        stays = column.gather(-1, y[..., None]).squeeze(-1)  # T_yy
        losses = cross_entropy(logits, batch.y)
        forget = forget_rate(visit.round - self.warm_up, rate=self.forget, ramp=self.ramp)
        chosen = peers(small_losses(losses.detach(), batch.real.repeat(2, 1), forget))
        loss = (weight * -log_q + mean_of(chosen) * (losses - self.anchor * stays.log())).sum(1)
        if self.decorrelation:
            loss = loss + self.decorrelation * transition.cross_correlation(resistant, sensitive, weight)
        reward = log_q - chosen * losses - self.kappa * m.mean(-1)
        baseline = self.remembered(visit, reward.detach(), batch)
        of_masks = -self.entropy * transition.entropy(s)
        if self.estimator == "reinforce":
            known = ~baseline.isnan()
            pulled = transition.policy_losses(reward, baseline.nan_to_num(), m, s)
            of_masks = of_masks + self.policy * known[:, None] * pulled
        else:
            of_masks = of_masks + self.policy * self.kappa * m.mean(-1)
        return loss + (weight * of_masks).sum(1)

    def masks(self, visit: Visit, s: Tensor, batch: Batch) -> Tensor:
        """m [2 N, B, F] of logits s."""
        B, F = s.shape[1:]
        # a batch's samples come first, so that a client beside longer ones draws what it draws alone
        uniform = visit.streams.uniform(B * 2 * F, Purpose.METHOD, batch.number).view(-1, B, 2, F)
        uniform = uniform.permute(2, 0, 1, 3).flatten(0, 1)
        if self.estimator == "reinforce":
            return transition.drawn(s, uniform)
        share = (visit.round - self.warm_up) / max(1, visit.schedule.rounds - 1 - self.warm_up)
        return transition.straight_through(s, uniform, WARM + share * (COLD - WARM))

    def remembered(self, visit: Visit, reward: Tensor, batch: Batch) -> Tensor:
        """b [2 N], the mean reward [2 N, B] of the batches before this one, NaN before the first; then counts it in."""
        sums, steps = visit.kept["reward"], visit.kept["steps"]
        before = sums / (1 - DECAY ** steps[:, None].double()).float()  # 0 / 0 is the NaN
        new = DECAY * sums + (1 - DECAY) * batch_mean(reward, batch).view(2, -1).T
        visit.kept["reward"] = torch.where(batch.live[:, None], new, sums)
        visit.kept["steps"] = steps + batch.live
        return before.T.flatten()

    def end(self, visit: Visit, rows: Tensor) -> Tensor:
        H = visit.kept["heads"].shape[2]
        visit.kept["heads"] = rows[:, :H].unflatten(0, (2, -1)).transpose(0, 1).clone()
        return rows

    def reply(self, visit: Visit, rows: Tensor) -> dict[str, Tensor]:
        """diagonal, sensitive [N], as the server has them; joint [N, C, C], the mean of p_i T_ij."""
        network, views = visit.network, visit.views(rows)
        assert isinstance(network, Separated)
        features, counts = visit.review(rows)[1], visit.data.counts
        told: dict[str, Tensor] = {}
        for h, real in zip(features.split(PIECE, 1), visit.data.real.split(PIECE, 1), strict=True):
            with torch.no_grad():
                s = network.separate(views, h)
                parts = network.parts(views, h, (s > 0).float())
                T = transition.transition(parts.transition, self.eps)
                weight = (real / counts[:, None]).repeat(2, 1) / 2  # the mean over both networks
                new = {
                    "diagonal": torch.einsum("nb,nbii->n", weight, T) / network.classes,
                    "sensitive": torch.einsum("nb,nbf->n", weight, s.sigmoid()) / network.factors,
                    "joint": torch.einsum("nb,nbi,nbij->nij", weight, parts.logits.softmax(-1), T),
                }
            new = {name: value.unflatten(0, (2, -1)).sum(0) for name, value in new.items()}
            told = {name: told.get(name, 0) + value for name, value in new.items()}
        return told

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        joint = torch.einsum("m,mij->ij", replies.weights.float(), replies.extra["joint"])
        told = {
            name: server[name].index_copy(0, replies.clients, replies.extra[name]) for name in ("diagonal", "sensitive")
        }
        return {**server, "model": replies.mean, "transition": joint / joint.sum(1, keepdim=True), **told}
