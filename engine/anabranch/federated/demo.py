"""Twenty clients learn to read digits, six of them hostile: what becomes of the mean, and of robust rules.

Hostile are the last clients, two (by default) of each kind:
  sign flip     send the honest mean, backwards and ten times as long
  ALIE          a little is enough: in each coordinate as far to one side as the crowd hides
  label flip    train honestly on labels that are turned around, 0 for 9 and so on
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.aggregate.robust import aggregate_updates
from anabranch.aggregate.settings import AggregateMethod
from anabranch.federated.attacks import a_little_is_enough, label_flip, sign_flip
from anabranch.federated.clients import accuracy, first_model, train
from anabranch.federated.digits import CLASSES, Digits, load_digits

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
    model = first_model(settings.hidden, generator)
    courses = {NOBODY_HOSTILE: _learn(model, digits, 0, AggregateMethod(rule="mean"), settings)}
    for name, rule in rules_compared(settings.hostile).items():
        courses[name] = _learn(model, digits, settings.hostile, rule, settings)
    return courses


def kinds_of_hostile(hostile: int) -> Mapping[str, int]:
    """How many clients attack in which way."""
    return {name: (hostile + 2 - i) // 3 for i, name in enumerate(("sign flip", "ALIE", "label flip"))}


def _learn(model: Tensor, digits: Digits, hostile: int, rule: AggregateMethod, settings: Settings) -> Course:
    course = [accuracy(model, digits.test_x, digits.test_y, settings.hidden)]
    for round in range(settings.rounds):
        updates = _updates(model, digits, hostile, settings)
        outcome = aggregate_updates(updates, rule, round=round)
        model = model + outcome.update
        course.append(accuracy(model, digits.test_x, digits.test_y, settings.hidden))
    assert outcome.coefficients is not None  # rules of distances only are compared
    return Course(course, updates, outcome.update, outcome.coefficients)


def _updates(model: Tensor, digits: Digits, hostile: int, settings: Settings) -> Tensor:
    """[N, D]: honest ones first, then those of each kind of hostile clients."""
    honest, kinds = settings.clients - hostile, kinds_of_hostile(hostile)
    misled = settings.clients - kinds["label flip"]
    y = torch.cat([digits.y[:misled], label_flip(digits.y[misled:], CLASSES)])
    trained = train(model, digits.x, y, hidden=settings.hidden, steps=settings.steps, lr=settings.lr)
    sound = trained[:honest]
    return torch.cat(
        [
            sound,
            sign_flip(sound, kinds["sign flip"], scale=10.0),
            a_little_is_enough(sound, kinds["ALIE"]),
            trained[misled:],
        ]
    )
