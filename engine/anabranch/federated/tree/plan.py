"""What a tree is to learn and how, as the command line says it. Torch is not needed to read it."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from anabranch.federated import options
from anabranch.federated.plan import Plan
from anabranch.federated.schedule import Schedule
from anabranch.federated.tree.topology import Tree, regular

BASE = "fedeec"
SCHEDULE = Schedule(rounds=30, epochs=1, batch=16, lr=0.02, weight_decay=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedEEC:
    """How neighbours learn from each other.

    networks      of each height, leaves first: mlp:16, mlp:64x32, cnn, resnet10, resnet18
    bridge        conv, pca:COMPONENTS or random
    rectify       off, ring:LENGTH, swap or mix:SHARE
    temperature   of predictions that are handed on
    ce            weight of the cross-entropy on bridge samples
    beta          weight of the distance from the teacher
    beta_inner    the same of students that are no leaves; None for beta
    gamma         weight of the cross-entropy on a leaf's own samples
    migrate       share of the leaves that move to another parent before each round but the first
    sequential    one link after another, as published, instead of siblings together
    """

    networks: tuple[str, ...] = ("mlp:16", "mlp:64", "mlp:256")
    bridge: str = "conv"
    rectify: str = "ring:20"
    temperature: float = 3.0
    ce: float = 1.0
    beta: float = 1.0
    beta_inner: float | None = None
    gamma: float = 1.0
    migrate: float = 0.0
    sequential: bool = False

    def __post_init__(self) -> None:
        if len(self.networks) < 2:
            raise ValueError(f"networks are of leaves, ..., root; two at least, got {list(self.networks)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("ce", "beta", "beta_inner", "gamma"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= self.migrate <= 1:
            raise ValueError(f"migrate must be in [0, 1], got {self.migrate}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TreePlan:
    """Trees, what they learn from, and where the results go.

    tree       nodes of each tier below the root, from the top
    public     share of the samples that is put aside to fit bridges; no leaf has them
    also       further settings to compare with, each as `rectify=off,sequential=true`
    averaging  compare with the mean of all leaves' models, too
    settings   those that the others are compared with
    plan       data, noise, partition, seeds, schedule; its clients are the leaves
    """

    tree: tuple[int, ...] = (3, 12)
    public: float = 0.15
    also: tuple[str, ...] = ()
    averaging: bool = False
    settings: FedEEC = field(default_factory=FedEEC)
    plan: Plan = field(default_factory=lambda: Plan(clients=12, partition="dirichlet:0.5", schedule=SCHEDULE))

    def __post_init__(self) -> None:
        if not 0 < self.public < 1:
            raise ValueError(f"public must be in (0, 1), got {self.public}")
        self.topology()  # says what is wrong with the tiers
        for one in self.variants().values():
            if len(one.networks) != len(self.tree) + 1:
                raise ValueError(
                    f"a tree of {len(self.tree) + 1} tiers needs as many networks, leaves first; got "
                    f"{list(one.networks)}"
                )
            if one.migrate and (len(self.tree) < 2 or self.tree[-2] < 2):
                raise ValueError(
                    f"leaves can only move if they have two parents or more, got the tree {list(self.tree)}"
                )

    def topology(self) -> Tree:
        """The tree before anybody moves."""
        return regular(self.tree)

    def variants(self) -> dict[str, FedEEC]:
        """What is compared, by name; the first is the baseline."""
        return {BASE: self.settings, **{text: changed(self.settings, text) for text in self.also}}

    def identity(self) -> dict[str, Any]:
        """All that a result depends on, but for the settings, noise, seed and data."""
        names = ("minimum", "partition", "picture_size")
        schedule = asdict(self.plan.schedule)
        del schedule["seed"]
        return {"tree": list(self.tree), "public": self.public, **{n: getattr(self.plan, n) for n in names}, **schedule}


def changed(settings: FedEEC, text: str) -> FedEEC:
    """Settings of which some are as `option=value,option=value` says."""
    given = options.pairs_of(re.split(r",(?=\w+=)", text))  # values may have commas of their own
    return options.make(FedEEC, {**asdict(settings), **given}, what=f"settings {text!r}")
