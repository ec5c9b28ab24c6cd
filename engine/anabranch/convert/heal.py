"""Healing: a converted model learns from its original to predict as that does, on any text and without labels.

    loss = mean KL(original || converted)  +  w * mean over layers of  |o - o'|^2 / |o'|^2

with o and o' what attention returns in the converted and in the original model; w is often zero.

From the literature  distillation on soft targets (arXiv 1503.02531); uptraining of merged heads (GQA, arXiv
                     2305.13245).
Reconstructed here   the second term as written. The V heads stay as they are, so that o and o' can be compared.

A run is a function of its settings, its models and its text: batches depend on (seed, step) and the schedule on the
step, so on a CPU with the same number of threads a resumed run gives bitwise the weights of an uninterrupted one.
"""

import hashlib
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from anabranch.common import run_state
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.convert.evaluate import compare, divergence, log_probabilities
from anabranch.convert.settings import ConvertSettings
from anabranch.data.stream import Batches
from anabranch.models.transformer import DenseAttend, Transformer

LOG = "loss.jsonl"
LOG_EVERY = 10
CURVES = {"train_kl": "training (mean since the last entry)", "held_out_kl": "held out"}


class Listen(DenseAttend):
    """Dense attention that keeps what it returned, in the order of the layers."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.outputs: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.outputs.append(super().__call__(layer, q, k, v, window))
        return self.outputs[-1]


def healing_loss(
    original: Transformer, student: Transformer, inputs: Tensor, attention_mse: float
) -> tuple[Tensor, Tensor]:
    """What is minimised over inputs [B, T] int64, and the KL part of it in nats per token; both scalars."""
    theirs, ours = Listen(len(inputs)), Listen(len(inputs))
    with torch.no_grad():
        wanted = log_probabilities(original, inputs, theirs)
    kl = divergence(wanted, log_probabilities(student, inputs, ours)).mean()
    if not attention_mse:
        return kl, kl
    shares = [
        F.mse_loss(our, their.float()) / their.float().square().mean()
        for our, their in zip(ours.outputs, theirs.outputs, strict=True)
    ]
    return kl + attention_mse * torch.stack(shares).mean(), kl


class Healing:
    """A student in training with its optimiser, its place in the schedule and its log."""

    def __init__(
        self,
        settings: ConvertSettings,
        original: Transformer,
        converted: Transformer,
        *,
        batches: Batches,
        probe: tuple[Tensor, Tensor],
        texts: str,
    ) -> None:
        """batches: what is trained on; probe: windows of held-out text, measured on the way; texts: their hashes."""
        self.settings, self.original, self.batches, self.probe = settings, original, batches, probe
        self.student = Transformer(converted.config, device=original.embed.device)
        self.student.load_state_dict(converted.state_dict())
        self.optimiser = make_optimiser(
            self.student,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
        )
        recipe = {**settings.recipe(), "model": fingerprint(original)}
        self.progress = run_state.Progress(corpus=texts, recipe=recipe)
        self.folder = settings.state_folder
        self.log = self.folder / LOG
        if settings.resume:
            self.progress = run_state.restore(self.folder, self.student, self.optimiser, self.progress)
            run_state.cut_log(self.log, self.progress.step)
        elif run_state.exists(self.folder):
            raise ValueError(f"{self.folder} already holds a run; resume it or choose another folder")
        else:
            self.log.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint

    def loop(self, interrupted: threading.Event) -> bool:
        """Take steps until the schedule ends or the event is set; leaves a checkpoint. True when all were taken."""
        settings, progress = self.settings, self.progress
        started = saved = time.monotonic()
        spent = progress.seconds
        with tqdm(
            total=settings.heal, initial=progress.step, unit="step", disable=not settings.progress, mininterval=1.0
        ) as bar:
            if progress.step == 0:
                self.report(bar)
            while progress.step < settings.heal and not interrupted.is_set():
                self.take_step()
                bar.update()
                now = time.monotonic()
                progress.seconds = spent + now - started
                self.report(bar)
                if now - saved >= settings.checkpoint_every_s:
                    run_state.save(self.folder, self.student, self.optimiser, progress)
                    saved = now
        run_state.save(self.folder, self.student, self.optimiser, progress)
        return progress.step >= settings.heal

    def take_step(self) -> None:
        settings, progress = self.settings, self.progress
        inputs, _ = self.batches.at(progress.step)
        rate = cosine_rate(
            progress.step, steps=settings.heal, warmup=settings.warmup, lr=settings.lr, final_lr=settings.final_lr
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        inputs = inputs.to(self.original.embed.device)
        loss, kl = healing_loss(self.original, self.student, inputs, settings.attention_mse)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        value = float(kl.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {progress.step}; try a smaller lr than {settings.lr}")
        progress.step += 1
        progress.loss_sum += value
        progress.loss_count += 1

    def report(self, bar: "tqdm[Any]") -> None:
        """Log the mean KL since the last entry, and that on the held-out text when it is due."""
        settings, progress = self.settings, self.progress
        entry: dict[str, float] = {}
        last = progress.step == settings.heal
        if progress.loss_count and (progress.step % LOG_EVERY == 0 or last):
            entry["train_kl"] = round(progress.loss_sum / progress.loss_count, 6)
            progress.loss_sum, progress.loss_count = 0.0, 0
        if progress.step % settings.evaluate_every == 0 or last:
            entry["held_out_kl"] = round(compare(self.original, self.student, *self.probe).kl, 6)
        if not entry:
            return
        tokens = progress.step * self.batches.batch * self.batches.context
        line = {"step": progress.step, "tokens": tokens, "seconds": round(progress.seconds, 1), **entry}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.shown.update(entry)
        bar.set_postfix({name: f"{value:.4f}" for name, value in progress.shown.items()})

    def result(self) -> Transformer:
        """The student in the original's dtype."""
        healed = Transformer(self.student.config, dtype=self.original.embed.dtype, device=self.original.embed.device)
        healed.load_state_dict(self.student.state_dict())
        return healed.eval()

    def draw(self, path: Path) -> None:
        """The log as a PNG; needs matplotlib."""
        from anabranch.common.plot import draw_loss

        draw_loss(self.log, path, CURVES, x="million tokens", y="KL to the original, nats per token")


def fingerprint(model: Transformer) -> str:
    """sha256 of all weights, so that healing never goes on with another original."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
