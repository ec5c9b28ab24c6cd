"""How long and how fast a federation learns. Torch is not needed to check it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Rounds, and the SGD of each client in one.

    rounds        in all
    share         of the clients that take part in a round, at least one does
    epochs        over a client's own samples in a round
    batch         samples of a step
    drop_last     leave out what does not fill a batch, but for clients whose samples fill none
    lr, momentum, weight_decay
                  of SGD, its momentum from zero in every round
    decorrelation times how much features of a batch go together (decorrelation.py) is added to any method's loss
    augment       show pictures shifted and mirrored (vectors: with a little noise)
    seed          of everything that is drawn
    """

    rounds: int = 30
    share: float = 1.0
    epochs: int = 5
    batch: int = 16
    drop_last: bool = False
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decorrelation: float = 0.0
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if not self.lr > 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                f"need lr > 0, momentum in [0, 1) and weight_decay >= 0, got {self.lr}, {self.momentum}, "
                f"{self.weight_decay}"
            )
        if not self.decorrelation >= 0:
            raise ValueError(f"decorrelation must not be negative, got {self.decorrelation}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")

    def cohort_size(self, clients: int) -> int:
        """Clients of a round."""
        return max(1, int(self.share * clients))
