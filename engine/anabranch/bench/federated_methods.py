"""What each method's passes through the network cost, beside FedAvg's: their number is the method's, their time ours.

A pass there and back counts as one, a pass there alone as a third.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from anabranch.bench.federated import Row, our_round
from anabranch.bench.timing import interleave, timed
from anabranch.data.sources import read_digits
from anabranch.federated.choices import METHODS, choose_method
from anabranch.federated.experiment import lay_out
from anabranch.federated.method import FedAvg, Visit
from anabranch.federated.networks.layout import Output, Views
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import Batch
from anabranch.federated.plan import Plan
from anabranch.federated.rounds import BACKWARD, Federation, found, run_round

NOISE = "pairflip:0.4"
OWN_LOSS = "fedavg, its loss by torch"
BEFORE = 3  # rounds before the one that is timed
# The timed round is one after the warm-up.
WARM: Mapping[str, str] = {
    **dict.fromkeys(("dividemix", "fedrn", "joint-optim", "selfie"), "warm_up=2"),
    **dict.fromkeys(("fednoro", "fedelc", "maskedoptim"), "warmup=2"),
    "co-teaching-plus": "start=2",
}


class OwnLoss(FedAvg):
    """FedAvg as methods are trained that have a loss of their own: no kernel takes whole epochs."""

    def loss_of(self, visit: Visit, out: Output, batch: Batch) -> Tensor:
        return FedAvg.loss_of(self, visit, out, batch)


class Counted(MLP):
    """A perceptron that counts the operations of what goes through it, of the way back twice as many."""

    done = 0

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        latent, statistics = super().encode(views, x, training=training)
        self._count(latent, 2 * self.widths[0] * self.widths[1])
        return latent, statistics

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        logits, features, statistics = super().decode(views, latent, training=training)
        self._count(logits, self.flops - 2 * self.widths[0] * self.widths[1])
        return logits, features, statistics

    def _count(self, out: Tensor, flops: int) -> None:
        self.done += out.shape[:2].numel() * flops * (BACKWARD if out.requires_grad else 1)


def measure_methods(names: Sequence[str], *, clients: int, repeats: int) -> list[Row]:
    """One round of each method, in turns and by one thread; 40 % of the digits' labels are wrong.

    First is FedAvg with its loss by torch, as it is the others', then FedAvg as it is.
    """
    names = [OWN_LOSS, "fedavg", *(name for name in names if name != "fedavg")]
    federations = [_warmed(name, clients) for name in names]
    passes = [_passes(name, federation) for name, federation in zip(names, federations, strict=True)]
    runs = [timed(partial(our_round, federation, 1)) for federation in federations]
    return [
        Row(
            case=f"methods, {clients} clients, 5 epochs", contender=name, seconds=tuple(seconds), clients=clients,
            passes=count / passes[0],
        )
        for name, count, seconds in zip(names, passes, interleave(runs, repeats=repeats, warmup=1), strict=True)
    ]  # fmt: skip


def all_methods() -> list[str]:
    """Names of all, once each: `robust` is the geometric median."""
    return [name for name in METHODS if name != "robust"]


def _warmed(name: str, clients: int) -> Federation:
    federation = _founded(name, clients, MLP)
    for _ in range(BEFORE):
        run_round(federation)
    return federation


def _founded(name: str, clients: int, perceptron: Callable[[Sequence[int]], MLP]) -> Federation:
    data = read_digits()
    plan = Plan(clients=clients, noise=(NOISE,))
    holdings = lay_out(plan, data, NOISE, plan.schedule.seed).holdings
    method = OwnLoss() if name == OWN_LOSS else choose_method(f"{name}:{WARM[name]}" if name in WARM else name).method
    return found(method, perceptron((data.x.shape[1], 64, data.classes)), holdings, plan.schedule)


def _passes(name: str, warmed: Federation) -> int:
    """Operations of one round."""
    made: list[Counted] = []

    def counted(widths: Sequence[int]) -> MLP:
        made.append(Counted(widths))
        return made[0]

    federation = _founded(name, len(warmed.holdings.owned), counted)
    our_round(replace(federation, server=warmed.server, kept=warmed.kept, round=warmed.round), 1)
    return made[0].done
