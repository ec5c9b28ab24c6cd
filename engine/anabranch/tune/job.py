"""Train adapters of a model on examples, and stop and go on at any step.

A run is a function of its settings, model and data: batches depend on (seed, step), the schedule on the step, and the
checkpoint holds weights, routers' biases and both AdamW moments. A step's loss is the mean over all tokens to learn in
it, of all passes and processes, so W processes do what one does with W times the passes, up to the order of sums.
"""

import json
import math
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings, Pruning
from anabranch.adapters.attach import Branch, attach, padded
from anabranch.adapters.files import CONFIG, save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import Growth, TriAdapt, TriAdaptSettings
from anabranch.common import run_state
from anabranch.common.checkpoint import write_json
from anabranch.common.interrupt import interruptible
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.data.instructions import read_examples
from anabranch.data.packing import IGNORED, Packed, Packs
from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.transformer import PackedAttend, Transformer
from anabranch.models.weights import load_model
from anabranch.tune.settings import TuneSettings

LOG, REPORT = "loss.jsonl", "tuning.json"
BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: losses in nats per learnt token, of the last logged steps and of the held-out examples."""

    steps: int
    interrupted: bool
    parameters: int
    examples: int
    cut: int  # of them, longer than the context
    dropped: int  # others with nothing to learn within it
    train_loss: float | None = None
    held_out_loss: float | None = None
    ranks: dict[str, int] | None = None  # of each layer that triadapt grew or adalora pruned


def tune(settings: TuneSettings) -> Outcome:
    """Train, resume or finish a run; writes adapters, loss.jsonl and tuning.json into `settings.out`.

    Raises ValueError for data and settings that cannot work and for a folder that already holds a run.
    """
    if settings.plot:
        from anabranch.common import plot  # noqa: F401  (fails now rather than after hours, when matplotlib is missing)
    run = _Run(settings)
    with interruptible() as interrupted:
        finished = run.loop(interrupted)
    return run.finish(interrupted=not finished)


def packed_loss(model: Transformer, batch: Packed) -> Tensor:
    """Cross-entropy in nats of a packed batch's targets, summed."""
    device = model.embed.device
    lengths = [length for row in batch.segments for length in row]
    inputs, targets, positions = (x.flatten().to(device) for x in (batch.inputs, batch.targets, batch.positions))
    hidden = model(inputs, positions, PackedAttend(lengths))
    learnt = targets != IGNORED  # the others need no scores
    return F.cross_entropy(model.logits(hidden[learnt]), targets[learnt], reduction="sum")


@torch.no_grad()
def mean_loss(model: Transformer, packs: Packs) -> float:
    """Of all examples, per learnt token."""
    nats = tokens = 0.0
    for batch in packs.once():
        nats += float(packed_loss(model, batch))
        tokens += int((batch.targets != IGNORED).sum())
    return nats / tokens


class _Run:
    """Adapters in training with their optimiser, their place in the schedule and their log."""

    def __init__(self, settings: TuneSettings) -> None:
        self.settings = settings
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        tokenizer = load_tokenizer(settings.model)
        if tokenizer is None:
            raise ValueError(f"{settings.model} has no tokenizer to read examples with")
        pack = partial(Packs, context=settings.context, batch=settings.batch, seed=settings.seed)
        self.packs = pack(read_examples(settings.data, tokenizer))
        self.probe = None if settings.held_out is None else pack(read_examples([settings.held_out], tokenizer))
        passes = settings.accumulate * self.size * settings.batch
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * self.packs.rows(0) / passes))
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self.model = load_model(settings.model, dtype=dtype, device=settings.device).train()
        self.adapters = attach(self.model, self._branch(), targets=settings.targets)
        self.weights = nn.ModuleList(self.adapters.values())
        self.growth = self._growth()
        self.optimiser = make_optimiser(self.weights, lr=settings.lr, weight_decay=settings.weight_decay, betas=BETAS)
        self.progress = run_state.Progress(corpus=self.packs.digest, recipe=settings.recipe(self.steps))
        self.log = settings.out / LOG
        settings.out.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            self.progress = run_state.restore(settings.out, self.weights, self.optimiser, self.progress)
            if self.rank == 0:
                run_state.cut_log(self.log, self.progress.step)
        elif run_state.exists(settings.out) or (settings.out / CONFIG).exists():
            raise ValueError(f"{settings.out} already holds a run; resume it or choose another folder")
        elif self.rank == 0:
            self.log.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint

    def _branch(self) -> Branch:
        s = self.settings
        random = torch.Generator(s.device).manual_seed(s.seed)
        if s.method == "triadapt":
            grown = TriAdaptSettings(
                reference=s.rank, alpha=s.alpha, steps=self.steps + 1, interval=s.growth_every,
                warmup=int(s.warmup * self.steps), orthogonality=s.orthogonality or 0.0,
            )  # fmt: skip
            return lambda name, inputs, outputs: TriAdapt(inputs, outputs, grown, device=s.device, generator=random)
        if s.method == "adalora":
            pruned = AdaLoraSettings(
                initial=s.rank + -(-s.rank // 2), target=s.rank, alpha=s.alpha, steps=self.steps,
                interval=s.growth_every, warmup=int(s.warmup * self.steps), final=self.steps // 2,
                orthogonality=0.5 if s.orthogonality is None else s.orthogonality,
            )  # fmt: skip
            return lambda name, inputs, outputs: AdaLora(inputs, outputs, pruned, device=s.device, generator=random)
        block = s.block if s.method == "experts" else 1
        chosen = None if s.method == "lora" else s.chosen or max(1, s.rank // block // 8)
        made = RankLoraSettings(ranks=s.rank, chosen=chosen, block=block, gate=s.gate, alpha=s.alpha, balance=s.balance)
        return lambda name, inputs, outputs: RankLora(inputs, outputs, made, device=s.device, generator=random)

    def _growth(self) -> Growth | Pruning | None:
        grown = {name: one for name, one in self.adapters.items() if isinstance(one, TriAdapt)}
        pruned = {name: one for name, one in self.adapters.items() if isinstance(one, AdaLora)}
        if grown:
            return Growth(next(iter(grown.values())).settings, grown)
        return Pruning(next(iter(pruned.values())).settings, pruned) if pruned else None

    def loop(self, interrupted: threading.Event) -> bool:
        """Take steps until the schedule ends or the event is set; leaves a checkpoint. True when all were taken."""
        settings, progress = self.settings, self.progress
        started = saved = time.monotonic()
        spent = progress.seconds
        with tqdm(
            total=self.steps, initial=progress.step, unit="step", disable=self.rank > 0 or not settings.progress,
            mininterval=1.0,
        ) as bar:  # fmt: skip
            while progress.step < self.steps and not self.all_agree(interrupted.is_set()):
                self.take_step()
                bar.update()
                now = time.monotonic()
                progress.seconds = spent + now - started
                self.report(bar)
                if now - saved >= settings.checkpoint_every_s:
                    self.save()
                    saved = now
        self.save()
        return progress.step >= self.steps

    def all_agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        return bool(self.total(torch.tensor(float(stop))) > 0)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def save(self) -> None:
        if self.rank == 0:
            run_state.save(self.settings.out, self.weights, self.optimiser, self.progress)

    def take_step(self) -> None:
        s, progress = self.settings, self.progress
        first = progress.step * s.accumulate * self.size + self.rank * s.accumulate
        batches = [self.packs.at(first + index) for index in range(s.accumulate)]
        learnt = self.total(torch.tensor(float(sum(int((batch.targets != IGNORED).sum()) for batch in batches))))
        rate = cosine_rate(
            progress.step, steps=self.steps, warmup=int(s.warmup * self.steps), lr=s.lr, final_lr=s.final_lr
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nats = torch.zeros(())
        for batch in batches:
            with padded(self.model, batch.used.to(s.device)):  # padding is not to be counted, in either pass
                loss = packed_loss(self.model, batch) / learnt.item()
                loss.backward()
            nats += loss.detach().cpu()
        penalty = None if self.growth is None or self.rank > 0 else self.growth.penalty()  # alike on all: counted once
        if penalty is not None:
            penalty.backward()
        for parameter in self.weights.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.total(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.weights.parameters(), s.clip)
        self.optimiser.step()
        if self.growth is not None:
            self.growth.look(progress.step + 1)
        self.optimiser.zero_grad(set_to_none=True)
        value = float(self.total(nats))
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {progress.step}; try a smaller lr than {s.lr}")
        for adapter in self.adapters.values():
            if isinstance(adapter, RankLora):
                adapter.rebalance()
        progress.step += 1
        progress.loss_sum += value
        progress.loss_count += 1

    def report(self, bar: "tqdm[Any]") -> None:
        """Log the mean loss since the last entry, and the held-out examples when it is due."""
        s, progress = self.settings, self.progress
        last = progress.step == self.steps
        if not last and progress.step % min(10, s.evaluate_every):
            return
        entry: dict[str, float] = {"train_loss": round(progress.loss_sum / progress.loss_count, 5)}
        progress.loss_sum, progress.loss_count = 0.0, 0
        if self.probe is not None and (last or progress.step % s.evaluate_every == 0):
            entry["held_out_loss"] = round(self.held_out(), 5)
        if self.growth is not None:
            entry["ranks"] = self.growth.total
        if self.rank > 0:
            return
        tokens = progress.step * s.accumulate * self.size * s.batch * s.context
        line = {"step": progress.step, "tokens": tokens, "seconds": round(progress.seconds, 1), **entry}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.shown.update(entry)
        bar.set_postfix({name: f"{value:.4g}" for name, value in progress.shown.items()})

    def held_out(self) -> float:
        assert self.probe is not None
        self.model.eval()
        loss = mean_loss(self.model, self.probe)
        self.model.train()
        return loss

    def finish(self, *, interrupted: bool) -> Outcome:
        s, shown = self.settings, self.progress.shown
        outcome = Outcome(
            steps=self.progress.step,
            interrupted=interrupted,
            parameters=sum(p.numel() for p in self.weights.parameters()),
            examples=self.packs.examples,
            cut=self.packs.cut,
            dropped=self.packs.dropped,
            train_loss=shown.get("train_loss"),
            held_out_loss=shown.get("held_out_loss"),
            ranks=None if self.growth is None else {name: one.rank for name, one in self.growth.layers.items()},
        )
        if interrupted or self.rank > 0:
            return outcome
        save_adapters(s.out, self.adapters, base_model=str(s.model))
        write_json(s.out / REPORT, {"recipe": self.progress.recipe, **asdict(outcome)})
        if s.plot:
            draw(s.out)
        return outcome


def draw(out: Path) -> None:
    """loss.png."""
    from anabranch.common.plot import draw_loss

    curves = {"train_loss": "training (mean since the last entry)", "held_out_loss": "held out"}
    draw_loss(out / LOG, out / "loss.png", curves, x="million tokens", y="nats per learnt token")
