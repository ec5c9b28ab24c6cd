"""What a training run is: its text, its model, its optimisation. Torch is not needed to read or check it."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# Where and how long a run works, not what it computes: these may differ when a run is resumed.
OPERATIONAL = frozenset({"out", "text", "resume", "time_limit_s", "checkpoint_every_s", "plot", "progress"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LMSettings:
    """One run. Fields that are not OPERATIONAL decide every bit of the result, together with the text.

    The defaults are the recipe of the model in the package.

    text       files, folders or patterns; empty means the Python standard library of this interpreter
    held_out   share of the bytes kept from training, in whole files
    head_dim   width of every query, key and value head
    steps      length of the schedule; the one field besides the OPERATIONAL ones that a resumed run may change
    lr         peak rate: reached linearly in `warmup` steps, then a cosine down to `final_lr` times as much
    init_std   None is 1/sqrt(hidden_size)
    weights    dtype of the model that is written; training itself is float32
    """

    out: Path
    text: tuple[str, ...] = ()
    held_out: float = 0.05
    hidden_size: int = 128
    ffn_size: int = 320
    layers: int = 3
    q_heads: int = 8
    k_heads: int = 2
    v_heads: int = 4
    head_dim: int = 16
    q_intermediate_size: int | None = 64
    augq_residual: bool = True
    context: int = 512
    batch: int = 2
    steps: int = 5400
    warmup: int = 100
    lr: float = 2e-3
    final_lr: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    init_std: float | None = None
    seed: int = 0
    weights: str = "bfloat16"
    device: str = "cpu"
    log_every: int = 50
    evaluate_every: int = 500
    evaluate_windows: int = 48
    checkpoint_every_s: float = 120.0
    time_limit_s: float | None = None
    resume: bool = False
    plot: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "batch", "steps", "log_every", "evaluate_every", "evaluate_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "beta1", "beta2"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to below the {self.steps} steps, got {self.warmup}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a share of lr and must be from 0 to 1, got {self.final_lr}")
        if self.weights not in ("bfloat16", "float32"):
            raise ValueError(f"weights must be 'bfloat16' or 'float32', got {self.weights!r}")

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OPERATIONAL}


def flag(name: str) -> str:
    """Command-line option of a field: `lr` is --lr, `time_limit_s` is --time-limit."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def command_line(settings: LMSettings) -> str:
    """The shell command that starts this run afresh."""
    words = ["anabranch", "train-lm", *settings.text]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("text", "resume") or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            words += [flag(field.name), "none" if value is None else str(value)]
    return shlex.join(words)
