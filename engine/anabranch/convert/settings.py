"""What a conversion is: its model, its method, its texts, its healing. Torch is not needed to read or check it."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# Where and how long a conversion works, not what it computes: these may differ when healing is resumed.
OPERATIONAL = frozenset(
    {"model", "out", "calibrate", "text", "state", "resume", "plot", "progress", "checkpoint_every_s", "device"}
)
METHODS = ("svd", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertSettings:
    """One conversion. Fields that are not OPERATIONAL decide the result, together with the model and the texts.

    calibrate   files, folders or patterns to measure queries and keys on; empty takes the weights alone
    text        to compare both models on; when healing, to train on, less a share `held_out` to compare both on
    context     tokens of a window; None is 512, or the model's positions if fewer
    heal        steps of distillation from the original; 0 leaves the merged weights as they are. When no head is merged
                there is nothing to heal and no step is taken
    attention_mse    weight of the layers' differences in attention, beside the KL of the logits
    lr          peak rate: reached linearly in `warmup` steps, then a cosine down to `final_lr` times as much
    state       folder of healing's checkpoint and log; None is `out`/.heal
    """

    model: Path
    out: Path
    key_heads: int
    method: str = "svd"
    calibrate: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    held_out: float = 0.1
    context: int | None = None
    batch: int = 8
    heal: int = 0
    attention_mse: float = 0.0
    lr: float = 3e-4
    warmup: int = 20
    final_lr: float = 0.05
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 100
    checkpoint_every_s: float = 60.0
    device: str = "cpu"
    state: Path | None = None
    resume: bool = False
    plot: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {list(METHODS)}")
        if self.method == "mean" and self.calibrate:
            raise ValueError("the method 'mean' has nothing to calibrate; leave --calibrate out or choose 'svd'")
        for name in ("key_heads", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        for name in ("heal", "attention_mse", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "clip", "beta1", "beta2"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("held_out", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be from 0 to 1, got {getattr(self, name)}")
        self._check_healing()

    def _check_healing(self) -> None:
        if not self.heal and (self.resume or self.plot):
            raise ValueError("only healing can be resumed or drawn: give --heal STEPS")
        if self.heal and not self.text:
            raise ValueError("healing needs text to train on: give --text FILES")
        if self.heal and not 0 <= self.warmup < self.heal:
            raise ValueError(f"warmup must be from 0 to below the {self.heal} steps of healing, got {self.warmup}")

    @property
    def state_folder(self) -> Path:
        return self.out / ".heal" if self.state is None else self.state

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result; the steps of healing under the name `run_state` lets change."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OPERATIONAL}
        steps = values.pop("heal")
        return {**values, "steps": steps}


def command_line(settings: ConvertSettings) -> str:
    """The shell command that makes this conversion."""
    words = ["anabranch", "convert", str(settings.model), str(settings.out), "--key-heads", str(settings.key_heads)]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("model", "out", "key_heads", "resume") or value == field.default:
            continue
        flag = field.name.removesuffix("_s").replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
