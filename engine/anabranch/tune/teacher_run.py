"""One layer learns the maps of several teachers: a run of the study of rank-wise routing, and what is measured of it.

Targets are what the frozen weight leaves to do, so the layer is trained alone. All methods start with the same scale
of each rank that a token uses (2) and see the same tokens in the same order.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.tune.teachers import Suite, Teachers, draw, make_teachers
from anabranch_kernels.rank_lora.op import rank_lora, table_of

SCALE = 2.0  # of a rank in use: alpha / r of LoRA, alpha / k where k gates sum to one
MEASURED = 4096  # tokens
WARMUP = 0.05
BETAS = (0.9, 0.999)


class SwitchLora(RankLora):
    """Experts of which a token picks one, weighted by its softmax over all of them (Switch, arXiv 2101.03961).

    RankLora's gates are normalised over the picked blocks: that of a single one is constant, and the router would get
    no gradient. Here it does, which makes the stronger peer.
    """

    def forward(self, x: Tensor, adapter_of: Tensor | None = None) -> Tensor:
        logits = F.linear(x, self.router)
        picked = (logits + self.bias).argmax(-1, keepdim=True)
        return super().forward(x, adapter_of) * logits.softmax(-1).gather(-1, picked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A layer: its settings, and whether a gate is a share of all blocks instead of the picked ones."""

    settings: RankLoraSettings
    over_all: bool = False

    def layer(self, width: int, generator: torch.Generator) -> RankLora:
        kind = SwitchLora if self.over_all else RankLora
        return kind(width, width, self.settings, generator=generator)


def _lora(ranks: int) -> Method:
    return Method(settings=RankLoraSettings(ranks=ranks, alpha=SCALE * ranks))


def _routed(block: int, gate: str, *, over_all: bool = False) -> Method:
    """64 ranks, 8 in use."""
    chosen = 8 // block
    alpha = SCALE * (64 // block if over_all else chosen)
    made = RankLoraSettings(ranks=64, block=block, chosen=chosen, gate=gate, alpha=alpha)
    return Method(settings=made, over_all=over_all)


METHODS: Mapping[str, Method] = {
    "lora-8": _lora(8),
    "lora-64": _lora(64),
    "experts 8x8": _routed(8, "sigmoid_renorm_unbiased"),
    "experts 8x8, Switch": _routed(8, "softmax_topk", over_all=True),
    "blocks of 4": _routed(4, "sigmoid_renorm_unbiased"),
    "blocks of 2": _routed(2, "sigmoid_renorm_unbiased"),
    "smora": _routed(1, "sigmoid_renorm_unbiased"),
    "smora, released gate": _routed(1, "sigmoid_renorm"),
    "smora, softmax": _routed(1, "softmax_topk"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRun:
    """Everything that decides a result. balance None: the method's own."""

    suite: Suite = field(default_factory=Suite)
    method: str = "smora"
    seed: int = 0
    lr: float = 3e-3
    steps: int = 300
    batch: int = 128
    balance: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {list(METHODS)}")
        if self.steps < 1 or self.batch < 1 or not self.lr > 0 or self.seed < 0:
            raise ValueError(f"need steps, batch >= 1, lr > 0 and seed >= 0, got {self}")

    def recipe(self) -> dict[str, Any]:
        return asdict(self)

    def make(self) -> Method:
        method = METHODS[self.method]
        if self.balance is None:
            return method
        return replace(method, settings=replace(method.settings, balance=self.balance))


def learn(run: TeacherRun) -> dict[str, Any]:
    """Train a layer and measure it on new tokens; see `measured`."""
    teachers_of, layer_of, tokens_of, measured_of = (
        torch.Generator().manual_seed(4 * run.seed + part) for part in range(4)
    )
    teachers = make_teachers(run.suite, teachers_of)
    layer = run.make().layer(run.suite.width, layer_of).train()
    optimiser = make_optimiser(layer, lr=run.lr, weight_decay=0.0, betas=BETAS)
    for step in range(run.steps):
        rate = cosine_rate(step, steps=run.steps, warmup=int(WARMUP * run.steps), lr=run.lr, final_lr=0.0)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x, y, _ = draw(run.suite, teachers, run.batch, tokens_of)
        loss = (layer(x) - y).square().sum(1).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        layer.rebalance()
    return measured(layer, run.suite, teachers, measured_of)


@torch.no_grad()
def measured(layer: RankLora, suite: Suite, teachers: Teachers, generator: torch.Generator) -> dict[str, Any]:
    """What is left to learn and how ranks are used, over new tokens.

    left       squared error as a share of the targets' energy; None when it is not finite
    variation  standard deviation by mean of how often blocks are picked; None without a router, as all below
    dead       share of blocks that no token picks
    within     overlap of the mean gates of two tasks, averaged over pairs of a group: 1 when equal, 0 when disjoint
    between    the same over pairs of different groups
    """
    layer.eval()
    x, y, task = draw(suite, teachers, MEASURED, generator)
    left = float((layer(x) - y).square().sum() / y.square().sum())
    found: dict[str, Any] = {"left": left if math.isfinite(left) else None}
    if layer.settings.chosen is None:
        return {**found, **dict.fromkeys(("variation", "dead", "within", "between"))}
    everyone = torch.zeros(len(x), dtype=torch.int32)
    table = table_of([layer.settings.place()])
    routed = rank_lora(x, layer.a, layer.b, layer.router, layer.bias, table, everyone)
    counts = routed.counts.double()
    gates = torch.zeros(len(x), len(counts)).scatter_(1, routed.picked.long(), routed.gates)
    used = torch.stack([gates[task == one].mean(0) for one in range(suite.tasks)])
    return {
        **found,
        "variation": float(counts.std(correction=0) / counts.mean()),
        "dead": float((counts == 0).double().mean()),
        **overlaps(used, suite),
    }


def overlaps(used: Tensor, suite: Suite) -> dict[str, float | None]:
    """Mean of sum_i min(g_si, g_ti) over pairs of tasks s, t, from their mean gates [N, G]; None without such pairs."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for s, t in combinations(range(suite.tasks), 2):
        found[suite.group(s) == suite.group(t)].append(float(torch.minimum(used[s], used[t]).sum()))
    within, between = (sum(some) / len(some) if some else None for some in (found[True], found[False]))
    return {"within": within, "between": between}
