"""Do ranks go where they are needed? Twelve linear layers with teachers of rank 1 to 12, learnt from one stream.

Layer m is to learn dW_m [width, width] of rank m, all of whose singular values are one, from x normal and y = dW_m x.
What it has not learnt is then exactly ||dW_m - what it computes||^2, of ||dW_m||^2 = m, and nothing else tells the
layers apart: with 6 ranks each, 21 of the 78 directions must stay unlearnt, with 72 ranks well placed 6.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings, Pruning
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import Growth, TriAdapt, TriAdaptSettings
from anabranch.common.optimise import cosine_rate, make_optimiser


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """teachers of rank 1 to `layers`, of width `width`; `reference` ranks a layer on average; the rest as in tune."""

    layers: int = 12
    width: int = 48
    reference: int = 6
    steps: int = 200
    batch: int = 48
    lr: float = 1e-2
    looks: int = 25

    @property
    def interval(self) -> int:
        return max(1, self.steps // self.looks)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRun:
    """unlearnt  share of the teachers' energy at the end, and `course` at every look; ranks and parameters at the end.

    order       Spearman's correlation of final and true ranks; None where all are equal
    foresight   the same of each look's scores and what the layers then lacked, its mean over the looks that grew ranks
    seconds     of the processor, in all steps; `choosing_s` of them went into choosing ranks
    """

    method: str
    seed: int
    unlearnt: float
    course: list[float]
    ranks: list[int]
    order: float | None
    foresight: float | None
    parameters: int
    seconds: float
    choosing_s: float


class Watched(Growth):
    """Growth that notes how its scores go with what each layer lacks, and can be told to grow by something else.

    lacks   [layers] ||dW_m - what layer m computes||^2, now
    probed  [layers] the size of the gradient that one more rank's B would get, A being a random row
    by      "change" as the method has it, "lack" as only the teacher knows it, or "probe"
    """

    def __init__(self, made: TriAdaptSettings, layers: Mapping[str, TriAdapt], by: str) -> None:
        super().__init__(made, layers)
        self.by, self.notes = by, list[float]()
        self.lacks, self.probed = torch.empty(0), torch.empty(0)

    def rise(self) -> Tensor:
        scores = {"change": super().rise(), "lack": self.lacks, "probe": self.probed}[self.by]
        if (note := spearman(scores.tolist(), self.lacks.tolist())) is not None:
            self.notes.append(note)
        return scores


def spearman(one: list[float], other: list[float]) -> float | None:
    """Rank correlation; None where one of them is constant."""
    try:
        from scipy.stats import spearmanr
    except ModuleNotFoundError as error:
        raise ImportError("this study needs SciPy: pip install 'anabranch[study]'") from error
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return round(float(spearmanr(one, other).statistic), 4)


def variants(s: TeacherSettings) -> dict[str, tuple[Any, str]]:
    """Settings of each method by name, and by what TriAdapt grows.

    The last four ask why: looks while every layer still moves, A and B kept orthonormal so that C alone has a size, and
    scores that see what is missing.
    """
    linear = TriAdaptSettings(
        reference=s.reference, alpha=float(s.reference), interval=s.interval, steps=s.steps, model="linear"
    )
    methods = {
        f"LoRA-{s.reference}": RankLoraSettings(ranks=s.reference, alpha=float(s.reference)),
        f"LoRA-{s.reference + 1}": RankLoraSettings(ranks=s.reference + 1, alpha=float(s.reference + 1)),
        "linear": linear,
        "power": replace(linear, model="power"),
        "constant": replace(linear, model="constant"),
        "AdaLoRA": AdaLoraSettings(
            initial=s.reference + -(-s.reference // 2), target=s.reference, alpha=1.5 * s.reference,
            interval=s.interval, warmup=s.steps // 10, final=s.steps // 2, steps=s.steps,
        ),
        "linear, early looks": replace(linear, interval=max(1, s.interval // 4)),
        "linear, orthonormal": replace(linear, orthogonality=0.5),
    }  # fmt: skip
    asked = {"linear, by probe": (linear, "probe"), "linear, by lack": (linear, "lack")}
    return {name: (made, "change") for name, made in methods.items()} | asked


def teachers(s: TeacherSettings, seed: int) -> list[Tensor]:
    """dW_m [width, width] of rank m = 1 to `layers`."""
    random = torch.Generator().manual_seed(seed)

    def basis(rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(s.width, rank, generator=random)).Q  # type: ignore[no-any-return]

    return [torch.mm(basis(rank), basis(rank).T) for rank in range(1, s.layers + 1)]


def learn(
    s: TeacherSettings, method: str, made: Any, by: str, seed: int, done: Callable[[], object] = lambda: None
) -> TeacherRun:
    """Train the layers of one method; `done` is called after every step."""
    kinds: dict[type, Any] = {RankLoraSettings: RankLora, TriAdaptSettings: TriAdapt, AdaLoraSettings: AdaLora}
    random = torch.Generator().manual_seed(1000 + seed)
    kind, wanted = kinds[type(made)], teachers(s, seed)
    layers = {str(m): kind(s.width, s.width, made, generator=random) for m in range(1, s.layers + 1)}
    weights = nn.ModuleList(layers.values())
    optimiser = make_optimiser(weights, lr=s.lr, weight_decay=0.0, betas=(0.9, 0.999))
    growth: Watched | Pruning | None = None
    if kind is not RankLora:
        growth = Watched(made, layers, by) if kind is TriAdapt else Pruning(made, layers)
    stream, course, choosing = torch.Generator().manual_seed(2000 + seed), [], 0.0
    energy = s.layers * (s.layers + 1) / 2

    def lacks() -> Tensor:
        return torch.stack([(one.delta() - dW).square().sum() for one, dW in zip(layers.values(), wanted, strict=True)])

    started = time.process_time()
    for step in range(1, s.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = cosine_rate(step - 1, steps=s.steps, warmup=s.steps // 20, lr=s.lr, final_lr=0.0)
        x = torch.randn(s.batch, s.width, generator=stream)
        errors = torch.stack([layer(x) - x @ dW.T for layer, dW in zip(layers.values(), wanted, strict=True)])
        loss: Tensor = errors.square().sum() / s.batch
        penalty = None if growth is None else growth.penalty()
        total: Tensor = loss if penalty is None else loss + penalty
        total.backward()
        optimiser.step()
        if isinstance(growth, Watched) and step % made.interval == 0:
            row = 0.02 * torch.randn(s.width, generator=stream)
            growth.lacks, growth.probed = lacks(), (errors.detach() * (x @ row)[:, None]).mean(1).norm(dim=1)
        if growth is not None:
            before = time.process_time()
            growth.look(step)
            choosing += time.process_time() - before
        optimiser.zero_grad()
        if step % s.interval == 0:
            course.append(round(float(lacks().sum()) / energy, 5))
        done()
    ranks = [layer.settings.ranks if growth is None else layer.rank for layer in layers.values()]
    notes = growth.notes if isinstance(growth, Watched) else []
    return TeacherRun(
        method=method, seed=seed, unlearnt=course[-1], course=course, ranks=ranks,
        order=spearman(list(range(1, s.layers + 1)), ranks),
        foresight=round(sum(notes) / len(notes), 4) if notes else None, parameters=parameters(made, ranks, s.width),
        seconds=round(time.process_time() - started, 3), choosing_s=round(choosing, 4),
    )  # fmt: skip


def parameters(made: Any, ranks: list[int], width: int) -> int:
    """Numbers that the adapters hold in the end: A and B, TriAdapt's C as one matrix, the diagonal of AdaLoRA's L."""
    power = {TriAdaptSettings: 2, AdaLoraSettings: 1}.get(type(made))
    return sum(2 * r * width + (0 if power is None else r**power) for r in ranks)
