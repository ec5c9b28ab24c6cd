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
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings, Pruning
from anabranch.adapters.attach import Branch, attach, merge, padded
from anabranch.adapters.files import CONFIG, save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import Growth, TriAdapt, TriAdaptSettings
from anabranch.common import run_state
from anabranch.common.checkpoint import copy_companions, write_json
from anabranch.common.interrupt import interruptible
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.data.instructions import read_examples
from anabranch.data.packing import IGNORED, Packed, Packs
from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.transformer import PackedAttend, Transformer
from anabranch.models.weights import load_model, save_model
from anabranch.tune.recompute import recompute_activations
from anabranch.tune.settings import TuneSettings
from anabranch.tune.start import attach_from
from anabranch.tune.usage import Usage

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
    held_out_perplexity: float | None = None
    examples_per_s: float | None = None  # of all processes, since the last start
    tokens_per_s: float | None = None  # padding not counted
    ranks: dict[str, int] | None = None  # of each layer that triadapt grew or adalora pruned


def tune(settings: TuneSettings) -> Outcome:
    """Train, resume or finish a run; writes adapters, loss.jsonl and tuning.json into `settings.out`.

    Raises ValueError for data and settings that cannot work and for a folder that already holds a run.
    """
    if settings.plot:
        from anabranch.tune import plots  # noqa: F401  (fails now rather than after hours, when matplotlib is missing)
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
        if settings.init_from is None or settings.resume:
            self.adapters = attach(self.model, self._branch(), targets=settings.targets)
        else:
            self.adapters = attach_from(settings.init_from, self.model, self._branch(), settings.targets)
        if settings.checkpoint_activations:
            recompute_activations(self.model)
        routed = {n: a for n, a in self.adapters.items() if isinstance(a, RankLora) and a.settings.chosen is not None}
        self.usage = Usage(routed) if routed else None
        self.weights = nn.ModuleList([*self.adapters.values(), *([self.usage] if self.usage else [])])
        self.changed: list[str] = []  # layers whose rank the last step changed
        self.seen = torch.zeros(2, dtype=torch.float64)  # examples and tokens since the start of this process
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
        blocks = s.rank // block
        # the gate of a single picked block is always one, and its router would learn nothing
        chosen = None if s.method == "lora" else s.chosen or min(blocks, max(2, blocks // 8))
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
        self.started = started = saved = time.monotonic()
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
        if self.rank > 0:
            return
        run_state.save(self.settings.out, self.weights, self.optimiser, self.progress)
        if self.settings.plot:
            from anabranch.tune.plots import draw

            draw(self.log)

    def take_step(self) -> None:
        s, progress = self.settings, self.progress
        first = progress.step * s.accumulate * self.size + self.rank * s.accumulate
        batches = [self.packs.at(first + index) for index in range(s.accumulate)]
        sizes = [[int((batch.targets != IGNORED).sum()), batch.examples, int(batch.used.sum())] for batch in batches]
        learnt, *seen = self.total(torch.tensor(sizes, dtype=torch.float64).sum(0)).tolist()
        self.seen += torch.tensor(seen)
        rate = cosine_rate(
            progress.step, steps=self.steps, warmup=int(s.warmup * self.steps), lr=s.lr, final_lr=s.final_lr
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nats = torch.zeros(())
        for batch in batches:
            with padded(self.model, batch.used.to(s.device)):  # padding is not to be counted, in either pass
                loss = packed_loss(self.model, batch) / learnt
                loss.backward()
            nats += loss.detach().cpu()
        penalty = None if self.growth is None or self.rank > 0 else self.growth.penalty()  # alike on all: counted once
        if penalty is not None:
            penalty.backward()
        for parameter in self.weights.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.total(parameter.grad)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.weights.parameters(), s.clip)
        self.optimiser.step()
        if self.growth is not None:
            self.changed = self.growth.look(progress.step + 1)
        self.optimiser.zero_grad(set_to_none=True)
        value = float(self.total(nats))
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {progress.step}; try a smaller lr than {s.lr}")
        counts = {name: one.rebalance() for name, one in self.adapters.items() if isinstance(one, RankLora)}
        if self.usage is not None:
            self.usage.add(counts)
        progress.step += 1
        progress.loss_sum += value
        progress.loss_count += 1

    def report(self, bar: "tqdm[Any]") -> None:
        """Log what there is since the last entry: every few steps, when ranks change, and more when it is measured."""
        s, progress = self.settings, self.progress
        often = min(10, s.evaluate_every)
        whole = progress.step == self.steps or progress.step % s.evaluate_every == 0
        if not (whole or self.changed or progress.step % often == 0):
            return
        entry: dict[str, Any] = {"train_loss": round(progress.loss_sum / progress.loss_count, 5)}
        progress.loss_sum, progress.loss_count = 0.0, 0
        if self.probe is not None and whole:
            entry["held_out_loss"] = round(self.held_out(), 5)
        if self.growth is not None:
            entry["ranks"] = self.growth.total
            if self.changed or whole or progress.step == often:
                entry["layer_ranks"] = {name: one.rank for name, one in self.growth.layers.items()}
        if self.usage is not None:
            entry |= self.usage.entry(whole=whole)
        if self.rank > 0:
            return
        tokens = progress.step * s.accumulate * self.size * s.batch * s.context
        line = {"step": progress.step, "tokens": tokens, "seconds": round(progress.seconds, 1), **entry}
        line |= {"lr": self.optimiser.param_groups[0]["lr"], "grad_norm": round(float(self.grad_norm), 5)}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.shown.update({name: value for name, value in entry.items() if not isinstance(value, dict)})
        shown = {**progress.shown, "tok/s": self.speed()[1], "examples/s": self.speed()[0]}
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})

    def speed(self) -> list[float]:
        """Examples and tokens a second, of all processes, since this one started; measuring and saving included."""
        speed: list[float] = (self.seen / max(1e-9, time.monotonic() - self.started)).tolist()
        return speed

    def held_out(self) -> float:
        assert self.probe is not None
        self.model.eval()
        loss = mean_loss(self.model, self.probe)
        self.model.train()
        return loss

    def finish(self, *, interrupted: bool) -> Outcome:
        s, shown = self.settings, self.progress.shown
        held_out, (examples, tokens) = shown.get("held_out_loss"), self.speed()
        outcome = Outcome(
            steps=self.progress.step,
            interrupted=interrupted,
            parameters=sum(p.numel() for p in self.weights.parameters()),
            examples=self.packs.examples,
            cut=self.packs.cut,
            dropped=self.packs.dropped,
            train_loss=shown.get("train_loss"),
            held_out_loss=held_out,
            held_out_perplexity=None if held_out is None else round(math.exp(min(held_out, 700.0)), 4),
            examples_per_s=round(examples, 2),
            tokens_per_s=round(tokens, 1),
            ranks=None if self.growth is None else {name: one.rank for name, one in self.growth.layers.items()},
        )
        if interrupted or self.rank > 0:
            return outcome
        save_adapters(s.out, self.adapters, base_model=str(s.model))
        write_json(s.out / REPORT, {"recipe": self.progress.recipe, **asdict(outcome)})
        if s.save_merged is not None:
            merge(self.model)
            copy_companions(s.model, s.save_merged)
            save_model(self.model, s.save_merged)
        return outcome
