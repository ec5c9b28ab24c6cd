"""What a run or a comparison is to do, as the command line or a TOML file says it. Torch is not needed to read it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from anabranch.federated import options
from anabranch.federated.schedule import Schedule

SCHEDULE = tuple(one.name for one in fields(Schedule))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Methods, what they learn from, and where the results go.

    method         NAME or NAME:option=value,... each
    noise          of the labels, each as `noise_groups` writes it
    data           digits, digits-shortcut, NAME=PATH or PATH; see `anabranch.data.sources`
    data_root      folder above the published data
    picture_size   pixels a side that pictures of folders are resized to
    clients        K
    partition      iid, shards:S, dirichlet:ALPHA, owners, resample:N
    minimum        samples of a client
    network        mlp, cnn, resnet10, resnet18 or text
    hidden         widths of the perceptron's layers
    secure         the mean as a secure sum, as privacy=2,dropouts=1; None for a plain one
    seeds          runs of each method and noise; the first has the schedule's seed, each further one the next
    evaluate_every rounds between looks at the test; after the last round there is always one
    threads        that train clients; the results do not depend on them
    out            folder for checkpoints and results
    resume         go on with what the folder holds
    """

    method: tuple[str, ...] = ("fedavg",)
    noise: tuple[str, ...] = ("clean",)
    data: str = "digits"
    data_root: Path | None = None
    picture_size: int | None = None
    clients: int = 20
    partition: str = "iid"
    minimum: int = 1
    network: str = "mlp"
    hidden: tuple[int, ...] = (64,)
    secure: str | None = None
    seeds: int = 1
    evaluate_every: int = 1
    threads: int | None = None
    out: Path | None = None
    resume: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        for name in ("clients", "seeds", "evaluate_every", "threads", "picture_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden and min(self.hidden) < 1:
            raise ValueError(f"widths of hidden layers must be positive, got {list(self.hidden)}")
        if not self.method or not self.noise:
            raise ValueError("name at least one method and one noise (clean)")
        if self.resume and self.out is None:
            raise ValueError("to resume, name the folder that was written: --out")

    def identity(self) -> dict[str, Any]:
        """All that a result depends on, but for the method, noise, seed and data."""
        names = ("picture_size", "clients", "partition", "minimum", "network", "hidden", "evaluate_every")
        shown = {name: getattr(self, name) for name in names}
        schedule = {name: getattr(self.schedule, name) for name in SCHEDULE if name != "seed"}
        sums = {"secure": self.secure} if self.secure else {}
        return {**shown, "hidden": list(self.hidden), **schedule, **sums}


def read_plan(config: Path | None, given: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The plan of a TOML file and of what was given beside it, which comes first; and the file's table `set`.

    The file's keys are the flags' names: `clients = 20`, `hidden = [64, 64]`, `noise = ["clean", "pairflip:0.4"]`.
    """
    table: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise ValueError(f"there is no file {config}")
        try:
            table = tomllib.loads(config.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{config} is not TOML: {error}") from error
    table = {name.replace("-", "_"): value for name, value in table.items()}
    chosen = table.pop("set", {})
    for name in ("method", "noise"):  # one may stand alone
        if isinstance(table.get(name), str):
            table[name] = [table[name]]
    values = {**table, **given}
    inner = {f"schedule.{name}" if name in SCHEDULE else name: value for name, value in values.items()}
    return options.make(Plan, inner, what=str(config or "the command line")), chosen
