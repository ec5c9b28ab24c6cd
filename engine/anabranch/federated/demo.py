"""Twenty clients learn to read digits, six of them hostile: what becomes of the mean, and of robust rules.

Hostile are the last clients, two (by default) of each kind:
  sign flip     send the honest mean, backwards and ten times as long
  ALIE          a little is enough: in each coordinate as far to one side as the crowd hides
  label flip    train honestly on labels that are turned around, 0 for 9 and so on
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate.robust import aggregate_updates
from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.attacks import a_little_is_enough, label_flip, sign_flip
from anabranch.federated.digits import CLASSES, PIXELS, Digits, load_digits
from anabranch.federated.evaluate import predict
from anabranch.federated.method import FedAvg, Replies, Tensors
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Federation, Holdings, found, run_round
from anabranch.federated.schedule import Schedule

NOBODY_HOSTILE = "mean, nobody hostile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """clients     in all, `hostile` of them hostile, as many of each kind as possible
    rounds, steps  rounds of all clients; steps of gradient descent in each
    skew           share of each client's digits that are nearly of one kind
    """

    clients: int = 20
    hostile: int = 6
    rounds: int = 10
    steps: int = 10
    lr: float = 0.5
    hidden: int = 32
    skew: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.hostile < self.clients:
            raise ValueError(f"need fewer than half of the clients hostile, got {self.hostile} of {self.clients}")
        if self.rounds < 1 or self.steps < 1 or self.hidden < 0 or not self.lr > 0:
            raise ValueError(
                f"need rounds and steps >= 1, hidden >= 0, lr > 0, got {self.rounds}, {self.steps}, {self.hidden}, "
                f"{self.lr}"
            )


class Course(NamedTuple):
    """accuracy   on the test digits: before the first round, then after each
    updates       [N, D] of the last round, as the server got them
    update        [D] what its rule made of them
    coefficients  [N] by which
    """

    accuracy: list[float]
    updates: Tensor
    update: Tensor
    coefficients: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked(FedAvg):
    """A rule in the mean's place. What the hostile clients, the last ones, have learned is not what they send.

    The server keeps Course's tensors of the last round beside the model.
    """

    needs_all: ClassVar[bool] = True

    rule: AggregateMethod
    hostile: int

    def aggregate(self, server: Tensors, replies: Replies, round: int) -> dict[str, Tensor]:
        assert replies.models is not None
        base = server["model"][0]
        updates = as_sent(replies.models[:, 0] - base, self.hostile)
        outcome = aggregate_updates(updates, self.rule, round=round)
        assert outcome.coefficients is not None  # rules of distances only are compared
        course = {"updates": updates, "update": outcome.update, "coefficients": outcome.coefficients}
        return {"model": (base + outcome.update)[None], **course}


def rules_compared(hostile: int) -> dict[str, AggregateMethod]:
    """What the server may do, by name."""
    return {
        "mean": AggregateMethod(rule="mean"),
        "geometric median": AggregateMethod(),
        "NNM + geometric median": AggregateMethod(pre=("nnm",), f=hostile),
    }


def run(settings: Settings) -> dict[str, Course]:
    """The same clients and hostility under every rule, and under the mean without the hostile. Deterministic."""
    generator = torch.Generator().manual_seed(settings.seed)
    digits = load_digits(settings.clients, skew=settings.skew, generator=generator)
    courses = {NOBODY_HOSTILE: _learn(digits, 0, AggregateMethod(rule="mean"), settings)}
    for name, rule in rules_compared(settings.hostile).items():
        courses[name] = _learn(digits, settings.hostile, rule, settings)
    return courses


def kinds_of_hostile(hostile: int) -> Mapping[str, int]:
    """How many clients attack in which way."""
    return {name: (hostile + 2 - i) // 3 for i, name in enumerate(("sign flip", "ALIE", "label flip"))}


def as_sent(updates: Tensor, hostile: int) -> Tensor:
    """Updates [N, D] as learned -> as sent: honest clients first, then each kind of hostile ones."""
    N, kinds = len(updates), kinds_of_hostile(hostile)
    honest, misled = updates[: N - hostile], updates[N - kinds["label flip"] :]
    flipped, hidden = (kinds[name] for name in ("sign flip", "ALIE"))
    return torch.cat([honest, sign_flip(honest, flipped, scale=10.0), a_little_is_enough(honest, hidden), misled])


def _learn(digits: Digits, hostile: int, rule: AggregateMethod, settings: Settings) -> Course:
    misled = kinds_of_hostile(hostile)["label flip"]
    C, n = digits.y.shape
    y = torch.cat([digits.y[: C - misled], label_flip(digits.y[C - misled :], CLASSES)])
    holdings = Holdings(digits.x.flatten(0, 1), y.flatten(), torch.arange(C * n).split(n))
    network = MLP((PIXELS, settings.hidden, CLASSES) if settings.hidden else (PIXELS, CLASSES))
    schedule = Schedule(  # plain gradient descent: an epoch is one step
        rounds=settings.rounds, epochs=settings.steps, batch=n, lr=settings.lr, momentum=0.0, weight_decay=0.0,
        seed=settings.seed,
    )  # fmt: skip
    federation = found(Attacked(rule=rule, hostile=hostile), network, holdings, schedule)
    course = [_accuracy(federation, digits)]
    for _ in range(settings.rounds):
        run_round(federation)
        course.append(_accuracy(federation, digits))
    last = federation.server
    return Course(course, last["updates"], last["update"], last["coefficients"])


def _accuracy(federation: Federation, digits: Digits) -> float:
    named = predict(federation.network, federation.server["model"][0], digits.test_x).argmax(1)
    return float((named == digits.test_y).double().mean())
