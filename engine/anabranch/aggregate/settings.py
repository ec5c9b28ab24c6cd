"""What is done to clients' updates: a rule, steps before it, and their options. Torch is not needed to check them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

RULES = {  # rule -> its options
    "mean": ("weights",),
    "geometric-median": ("weights", "tol"),
    "medoid": ("weights",),
    "krum": ("f", "neighbours"),
    "multi-krum": ("f", "chosen", "neighbours"),
    "distance-trimmed-mean": ("f",),
    "bulyan": ("f",),
    "bulyan-selection": ("f",),
    "minimum-diameter": ("f",),
    "smea": ("f",),
    "covariance-filter": ("f",),
    "centred-clipping": ("radius", "steps"),
    "nearest-neighbours": ("f", "own"),
    "fltrust": ("root",),
    "foolsgold": ("confidence",),
    "coordinate-median": (),
    "lower-median": (),
    "trimmed-mean": ("f",),
    "mean-around-median": ("f",),
    "phocas": ("f",),
    "sign-majority": ("step",),
}
MIXES = {  # step before a rule -> its options
    "nnm": ("f",),
    "bucketing": ("bucket", "seed"),
    "static-clipping": ("clip",),
    "adaptive-clipping": ("f",),
}
REQUIRED = frozenset({"f", "radius", "own", "root", "bucket", "clip"})
BY_COORDINATE = frozenset(
    {"coordinate-median", "lower-median", "trimmed-mean", "mean-around-median", "phocas", "sign-majority"}
)
AROUND_BASE = frozenset(
    {"centred-clipping", "fltrust", "foolsgold", "sign-majority", "static-clipping", "adaptive-clipping"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateMethod:
    """A rule with the steps before it. AggregateOptions that are None have their defaults, if they have any.

    rule         of RULES
    pre          of MIXES, in the order in which they are done
    f            clients that may send anything; those that are dropped count among them
    weights      of the clients, not negative; one each by default
    tol          that the geometric median's bound must reach; 1e-6
    neighbours   that count in a Krum score; N - f - 2
    chosen       best clients that multi-Krum averages; N - f
    radius       that centred clipping cuts differences from the base to
    steps        of centred clipping; 1
    own, root    index of the client whose neighbours count, or that is trusted
    confidence   kappa of FoolsGold; 1
    step         length of the majority's sign in every coordinate; 1
    bucket       clients of a bucket
    seed         of the drawing of buckets; 0
    clip         that static clipping cuts updates to
    """

    rule: str = "geometric-median"
    pre: tuple[str, ...] = ()
    f: int | None = None
    weights: tuple[float, ...] | None = None
    tol: float | None = None
    neighbours: int | None = None
    chosen: int | None = None
    radius: float | None = None
    steps: int | None = None
    own: int | None = None
    root: int | None = None
    confidence: float | None = None
    step: float | None = None
    bucket: int | None = None
    seed: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; choose one of {list(RULES)}")
        unknown = [name for name in self.pre if name not in MIXES]
        if unknown or len(set(self.pre)) < len(self.pre):
            raise ValueError(f"steps before a rule are {list(MIXES)}, each at most once, got {list(self.pre)}")
        taken = {*RULES[self.rule], *(option for name in self.pre for option in MIXES[name])}
        options = [field.name for field in fields(self) if field.name not in ("rule", "pre")]
        given = {name for name in options if getattr(self, name) is not None}
        if given - taken:
            allowed = ", ".join(name for name in options if name in taken) or "no options"
            raise ValueError(f"{self.title} takes {allowed}; got {', '.join(sorted(given - taken))} too")
        if (REQUIRED & taken) - given:
            raise ValueError(f"{self.title} needs {', '.join(sorted((REQUIRED & taken) - given))}")
        if "bucketing" in self.pre and given & {"weights", "own", "root"}:
            raise ValueError("behind bucketing no client is known any more: leave out weights, own and root")
        if self.f is not None and self.f < 0:
            raise ValueError(f"f must be at least 0, got {self.f}")

    @property
    def title(self) -> str:
        """The rule and what is done before it, in words."""
        return " after ".join([self.rule, *reversed(self.pre)])

    @property
    def needs_products(self) -> bool:
        """Whether clients' products decide, which takes a sweep of its own."""
        return bool(self.pre) or not (self.rule == "mean" or self.by_coordinate)

    @property
    def by_coordinate(self) -> bool:
        return self.rule in BY_COORDINATE

    @property
    def around_base(self) -> bool:
        """Whether the result depends on where the base lies: lengths, angles and signs are those of differences."""
        return not AROUND_BASE.isdisjoint((self.rule, *self.pre))

    def check(self, N: int) -> None:
        """ValueError for options that do not fit N clients."""
        if self.weights is not None:
            fine = all(0 <= w < float("inf") for w in self.weights) and sum(self.weights) > 0
            if len(self.weights) != N or not fine:
                raise ValueError(
                    f"weights must be {N} finite numbers, not negative, some positive, got {list(self.weights)}"
                )
        for name in ("own", "root"):
            index = getattr(self, name)
            if index is not None and not 0 <= index < N:
                raise ValueError(f"{name} must be the index of one of {N} clients, got {index}")

    def without(self, dropped: Sequence[int], N: int) -> "AggregateMethod":
        """The method for those of N clients that are left. Raises ValueError where nothing is left to stand on."""
        kept = [i for i in range(N) if i not in set(dropped)]
        if not kept:
            raise ValueError("no client is left")
        for name in ("own", "root"):
            if getattr(self, name) in dropped:
                raise ValueError(f"{name} is client {getattr(self, name)}, which is not finite")
        if self.f is not None and self.f < len(dropped):
            raise ValueError(f"{len(dropped)} clients are not finite, and f={self.f} says that fewer may be bad")
        index = {client: i for i, client in enumerate(kept)}
        weights = None if self.weights is None else tuple(self.weights[i] for i in kept)
        return replace(
            self,
            weights=weights,
            f=None if self.f is None else self.f - len(dropped),
            own=None if self.own is None else index[self.own],
            root=None if self.root is None else index[self.root],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateOptions:
    """How a method is applied.

    per_tensor  each tensor by itself, instead of all numbers of a client as one vector
    non_finite  "raise" for clients with Inf or NaN, or "drop" them: they count among the method's f
    distances   report distances where that takes arithmetic of its own: for the mean and rules of coordinates
    """

    per_tensor: bool = False
    non_finite: str = "raise"
    distances: bool = True

    def __post_init__(self) -> None:
        if self.non_finite not in ("raise", "drop"):
            raise ValueError(f"non_finite must be 'raise' or 'drop', got {self.non_finite!r}")
