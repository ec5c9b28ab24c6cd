"""What a tuning run is: its model, data, method and schedule. Torch is not needed to read or check it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

METHODS = ("lora", "experts", "smora", "triadapt", "adalora")
ROUTED = ("experts", "smora")
GATES = ("softmax_topk", "sigmoid_renorm", "sigmoid_renorm_unbiased")
DTYPES = ("auto", "float32", "bfloat16")
# Where and how long a run works, not what it computes: these may differ when it is resumed.
OPERATIONAL = frozenset(
    {
        "model", "data", "held_out", "out", "init_from", "save_merged", "resume", "plot", "progress",
        "checkpoint_every_s", "checkpoint_activations", "device",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """One run. Fields that are not OPERATIONAL decide the result, together with the model and the data.

    method       lora; experts: blocks of `block` ranks of which `chosen` take part; smora: the same with blocks of one;
                 triadapt: ranks grow to a mean of `rank`; adalora: half as many again, pruned to it by half time
    data         JSONL files of examples, one named twice counting twice; held_out: another to measure on
    init_from    a folder of adapters to begin with, of the same method, sizes and layers
    save_merged  a folder for the whole model with the adapters added to its weights
    targets      layers to adapt: names, ends or patterns
    rank         r of each layer; for triadapt and adalora the mean at the end
    chosen       blocks that a token picks; None: an eighth of them, at least two
    block        ranks of an expert
    alpha        scale of the branch: alpha / rank for lora and triadapt, alpha / initial rank for adalora, alpha where
                 gates sum to one
    balance      how far a step moves the bias of a block towards equal use
    growth_every steps between looks at the importance of layers (triadapt) or masks (adalora)
    orthogonality  weight of the penalty on A and B (triadapt, adalora); None: each one's own, 0 and 0.5
    epochs       times the examples are gone through; or `steps`
    batch        rows of `context` tokens of one pass; accumulate: passes of one step, on each process
    checkpoint_activations   compute them again in the backward pass instead of keeping them
    dtype        of the model's own weights; adapters are trained in float32
    """

    model: Path
    data: tuple[Path, ...]
    out: Path
    held_out: Path | None = None
    init_from: Path | None = None
    save_merged: Path | None = None
    method: str = "lora"
    targets: tuple[str, ...] = ("*",)
    rank: int = 16
    chosen: int | None = None
    block: int = 8
    gate: str = "sigmoid_renorm_unbiased"
    alpha: float = 16.0
    balance: float = 1e-4
    growth_every: int = 50
    orthogonality: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    context: int = 1024
    batch: int = 4
    accumulate: int = 1
    lr: float = 1e-4
    warmup: float = 0.1
    final_lr: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    evaluate_every: int = 100
    checkpoint_every_s: float = 60.0
    checkpoint_activations: bool = False
    device: str = "cpu"
    resume: bool = False
    plot: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("gate", GATES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {list(known)}")
        for name in ("rank", "block", "growth_every", "batch", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "epochs", "alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("balance", "weight_decay", "orthogonality"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be from 0 to 1, got {getattr(self, name)}")
        if self.context < 2 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"need context >= 2 and steps >= 1, got {self.context} and {self.steps}")
        if self.save_merged is not None:
            if self.method in ROUTED:
                raise ValueError(
                    f"adapters of {self.method} depend on each token, so no weight can hold them; save_merged is for "
                    f"{[method for method in METHODS if method not in ROUTED]}"
                )
            used = self.save_merged.exists() and (not self.save_merged.is_dir() or any(self.save_merged.iterdir()))
            if used or self.save_merged == self.out:
                raise ValueError(f"save_merged needs a new or empty folder of its own, got {self.save_merged}")
        if not self.data:
            raise ValueError("data must name at least one file")
        if not self.targets:
            raise ValueError("targets must name at least one layer or pattern")

    def recipe(self, steps: int) -> dict[str, Any]:
        """The fields that decide the result, with the steps they come to."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OPERATIONAL}
        return {**values, "targets": list(self.targets), "steps": steps}
