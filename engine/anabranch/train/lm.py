"""Train a small byte-level DiffQKV language model, and stop and go on at any step.

A run is a function of its settings and its text: batches depend on (seed, step), the schedule on the step, and the
checkpoint holds weights, both AdamW moments and the running loss. So a run that was interrupted and resumed gives, on
a CPU with the same number of threads, bitwise the weights of one that was not.
"""

import json
import math
import platform
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from anabranch.common import run_state
from anabranch.common.checkpoint import write_json
from anabranch.common.interrupt import interruptible
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.data.stream import Batches, held_out_windows
from anabranch.data.text_files import find_files
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model
from anabranch.train.corpus import BOS, EOS, VOCAB_SIZE, Corpus, read_corpus, standard_library
from anabranch.train.settings import LMSettings, command_line
from anabranch.train.tokenizer import write_tokenizer

LOG = "loss.jsonl"
REPORT = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    stopped    None when all steps are done, else "time limit" or "interrupted"; both resume
    held_out_bits_per_byte           of the float32 weights over the whole held-out text; None when interrupted,
    stored_bits_per_byte             for then only the checkpoint is written. The same of the model in its stored dtype
    """

    steps: int
    stopped: str | None
    held_out_bits_per_byte: float | None = None
    stored_bits_per_byte: float | None = None


def train(settings: LMSettings) -> Outcome:
    """Train, resume, or finish a run; writes a model folder, loss.jsonl and training.json into `settings.out`.

    ValueError for text that is missing, empty or shorter than the context, for a folder that already holds a run
    (unless resumed), and for a checkpoint of another run.
    """
    if settings.plot:
        from anabranch.common import plot  # noqa: F401  (fails now rather than after hours, when matplotlib is missing)
    corpus = read_corpus(find_files(settings.text) if settings.text else standard_library(), held_out=settings.held_out)
    run = _Run(settings, corpus)
    with interruptible() as interrupted:
        stopped = run.loop(interrupted)
    if stopped == "interrupted":
        return Outcome(steps=run.progress.step, stopped=stopped)
    return run.finish(stopped)


def model_config(settings: LMSettings) -> ModelConfig:
    """The Sigma model of a run, embeddings tied, over bytes."""
    return ModelConfig(
        family="sigma",
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        ffn_size=settings.ffn_size,
        layers=settings.layers,
        q_heads=settings.q_heads,
        k_heads=settings.k_heads,
        v_heads=settings.v_heads,
        k_dim=settings.head_dim,
        v_dim=settings.head_dim,
        max_position=settings.context,
        q_intermediate_size=settings.q_intermediate_size,
        augq_residual=settings.augq_residual,
        tie_embeddings=True,
        bos_id=BOS,
        eos_ids=(EOS,),
    )


def token_loss(model: Transformer, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of targets [B, T] after inputs [B, T], both int64; targets of -100 count nothing."""
    B, T = inputs.shape
    positions = torch.arange(T, device=inputs.device).repeat(B)
    hidden = model(inputs.flatten(), positions, DenseAttend(B))
    return F.cross_entropy(model.logits(hidden), targets.flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: Transformer, inputs: Tensor, targets: Tensor, *, batch: int = 8) -> float:
    """Bits the model spends on windows of text, divided by the bytes in it; the marks between files are paid for too.

    inputs, targets  [n, context] int64 as from `held_out_windows`
    """
    device = model.embed.device
    nats = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        nats += float(token_loss(model, x.to(device), y.to(device), reduction="sum"))
    return nats / math.log(2) / int(((targets >= 0) & (targets < 256)).sum())


class _Run:
    """A model in training with its optimiser, its place in the schedule and its log."""

    def __init__(self, settings: LMSettings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.batches = Batches(stream=corpus.train, context=settings.context, batch=settings.batch, seed=settings.seed)
        self.probe = held_out_windows(corpus.held_out, settings.context, settings.evaluate_windows)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        self.model = Transformer(model_config(settings), device=settings.device).initialise(
            generator, settings.init_std or settings.hidden_size**-0.5
        )
        self.optimiser = make_optimiser(
            self.model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
        )
        self.progress = run_state.Progress(corpus=corpus.sha256, recipe=settings.recipe())
        settings.out.mkdir(parents=True, exist_ok=True)
        self.log = settings.out / LOG
        if settings.resume:
            self.progress = run_state.restore(settings.out, self.model, self.optimiser, self.progress)
            run_state.cut_log(self.log, self.progress.step)
        elif run_state.exists(settings.out) or self.log.exists():
            raise ValueError(f"{settings.out} already holds a run; resume it or choose another folder")

    def loop(self, interrupted: threading.Event) -> str | None:
        """Take steps until the schedule ends or something stops it; leaves a checkpoint either way."""
        settings, progress = self.settings, self.progress
        started = saved = time.monotonic()
        spent = progress.seconds
        stopped = None
        tokens = settings.batch * settings.context
        with tqdm(
            total=settings.steps * tokens,
            initial=progress.step * tokens,
            unit="tok",
            unit_scale=True,
            disable=not settings.progress,
            mininterval=1.0,
        ) as bar:
            while progress.step < settings.steps and stopped is None:
                self.take_step()
                bar.update(tokens)
                now = time.monotonic()
                progress.seconds = spent + now - started
                self.report(bar)
                if settings.time_limit_s is not None and now - started >= settings.time_limit_s:
                    stopped = "time limit"
                if interrupted.is_set():
                    stopped = "interrupted"
                if now - saved >= settings.checkpoint_every_s:
                    run_state.save(settings.out, self.model, self.optimiser, progress)
                    saved = now
        run_state.save(settings.out, self.model, self.optimiser, progress)
        return stopped if progress.step < settings.steps else None

    def take_step(self) -> None:
        settings, progress = self.settings, self.progress
        inputs, targets = (x.to(settings.device) for x in self.batches.at(progress.step))
        rate = cosine_rate(
            progress.step, steps=settings.steps, warmup=settings.warmup, lr=settings.lr, final_lr=settings.final_lr
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = token_loss(self.model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} at step {progress.step}; try a smaller lr than {settings.lr}")
        progress.step += 1
        progress.loss_sum += value / math.log(2)
        progress.loss_count += 1

    def report(self, bar: "tqdm[Any]") -> None:
        """Log the mean loss since the last entry, and the held-out text when it is due."""
        settings, progress = self.settings, self.progress
        entry: dict[str, float] = {}
        last = progress.step == settings.steps
        if progress.step % settings.log_every == 0 or last:
            entry["train_bits_per_token"] = round(progress.loss_sum / progress.loss_count, 5)
            progress.loss_sum, progress.loss_count = 0.0, 0
        if progress.step % settings.evaluate_every == 0 or last:
            entry["held_out_bits_per_byte"] = round(bits_per_byte(self.model, *self.probe), 5)
        if not entry:
            return
        tokens = progress.step * settings.batch * settings.context
        line = {"step": progress.step, "tokens": tokens, "seconds": round(progress.seconds, 1), **entry}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.shown.update(entry)
        names = {"train_bits_per_token": "loss", "held_out_bits_per_byte": "held out"}
        bar.set_postfix({names[key]: f"{value:.3f} bits/byte" for key, value in progress.shown.items()})

    def finish(self, stopped: str | None) -> Outcome:
        """Write the model folder and the report, and measure both the trained and the stored weights."""
        settings, progress = self.settings, self.progress
        windows = held_out_windows(self.corpus.held_out, settings.context)
        trained = bits_per_byte(self.model, *windows)
        dtype = torch.bfloat16 if settings.weights == "bfloat16" else torch.float32
        with torch.no_grad():
            stored = Transformer(self.model.config, dtype=dtype)
            stored.load_state_dict({name: x.to(dtype) for name, x in self.model.state_dict().items()})
        save_model(stored, settings.out)
        write_tokenizer(settings.out, context=settings.context)
        write_json(
            settings.out / "generation_config.json",
            {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7, "top_p": 0.95},
        )
        kept = trained if dtype == torch.float32 else bits_per_byte(load_model(settings.out), *windows)
        outcome = Outcome(
            steps=progress.step,
            stopped=stopped,
            held_out_bits_per_byte=round(trained, 5),
            stored_bits_per_byte=round(kept, 5),
        )
        write_json(settings.out / REPORT, self.describe(outcome))
        if settings.plot:
            from anabranch.common.plot import draw_loss

            curves = {
                "train_bits_per_token": "training (mean since the last entry)",
                "held_out_bits_per_byte": "held out",
            }
            picture = settings.out / "loss.png"
            draw_loss(self.log, picture, curves, x="million tokens (bytes)", y="bits per byte")
        return outcome

    def describe(self, outcome: Outcome) -> dict[str, Any]:
        """The contents of training.json."""
        settings, corpus = self.settings, self.corpus
        return {
            "command": command_line(settings),
            "recipe": settings.recipe(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": {
                "source": list(settings.text) or f"standard library of Python {platform.python_version()}",
                "sha256": corpus.sha256,
                "bytes": corpus.bytes_total,
                "files": corpus.files,
                "held_out_files": corpus.held_out_files,
                "held_out_tokens": corpus.held_out.numel(),
            },
            **asdict(outcome),
            "tokens": outcome.steps * settings.batch * settings.context,
            "epochs": round(outcome.steps * settings.batch / self.batches.windows, 3),
            "seconds": round(self.progress.seconds, 1),
            "schedules": self.progress.schedules,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
