"""`anabranch convert`: fewer K heads for a checkpoint, with what that costs and what healing gives back."""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.convert.settings import METHODS, ConvertSettings

if TYPE_CHECKING:
    from anabranch.convert.evaluate import Agreement
    from anabranch.convert.job import Outcome

INTERRUPTED = 130  # 128 + SIGINT
EXAMPLES = """examples:
  anabranch convert ./Llama-3.2-1B ./llama-k2 --key-heads 2 --text sample.txt
  anabranch convert ./Llama-3.2-1B ./llama-k2 --key-heads 2 --calibrate other.txt --text sample.txt --json
  anabranch convert ./Llama-3.2-1B ./llama-k2 --key-heads 2 --heal 2000 --text 'books/*.txt' --plot
  anabranch convert ./Llama-3.2-1B ./llama-k2 --key-heads 2 --heal 2000 --text 'books/*.txt' --plot --resume

The folder made is a model folder: anabranch generate ./llama-k2 --prompt "Once upon a time"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    defaults = {field.name: field.default for field in fields(ConvertSettings)}
    add = parser.add_argument
    add("model", type=Path, help="model folder with as many K as V heads: Llama, Mistral or Qwen2")
    add("out", type=Path, help="folder for the converted model")
    add("--key-heads", type=int, required=True, help="K heads to keep; must divide the model's")
    add(
        "--method",
        choices=METHODS,
        default="svd",
        help="svd: best complex factor per head and frequency; mean: pooling",
    )
    add("--calibrate", nargs="+", metavar="FILE", default=(), help="text to measure keys on (default: weights alone)")
    add("--text", nargs="+", metavar="FILE", default=(), help="files, folders, patterns to compare on, or to heal with")
    add("--context", type=int, help="tokens of a window (default: 512, or the model's positions if fewer)")
    add("--heal", type=int, metavar="STEPS", default=0, help="steps of distillation from the original (default: none)")
    for name, text in {
        "held_out": "share of the text kept from healing to measure on",
        "batch": "windows of a step",
        "attention_mse": "weight of the layers' attention outputs in the loss, beside the logits' KL",
        "lr": "highest learning rate",
        "warmup": "steps in which it rises",
        "final_lr": "last learning rate, as a share of the highest",
        "weight_decay": "AdamW's decay of the matrices",
        "beta1": "AdamW's first moment",
        "beta2": "AdamW's second moment",
        "clip": "largest norm of the gradient",
        "seed": "of the order of the text",
        "evaluate_every": "steps between measurements on the held-out text",
    }.items():
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        add(flag, type=type(default), default=default, help=f"healing: {text} (default: %(default)s)")
    add(
        "--checkpoint-every", dest="checkpoint_every_s", type=float, metavar="SECONDS", default=60.0,
        help="healing: seconds between checkpoints (default: %(default)s)",
    )  # fmt: skip
    add("--state", type=Path, help="healing: folder of its checkpoint and log (default: OUT/.heal)")
    add("--resume", action="store_true", help="healing: go on from the checkpoint")
    add("--plot", action="store_true", help="healing: draw healing.png (needs matplotlib: the extra `plot`)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="healing: show a progress bar")
    add("--device", default="cpu", help="torch device to compute on (default: %(default)s)")
    add("--threads", type=int, help="threads torch computes with (default: torch's choice)")
    add("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came of it; 130 after Ctrl-C."""
    values = {field.name: getattr(args, field.name) for field in fields(ConvertSettings)}
    settings = ConvertSettings(**{**values, "calibrate": tuple(args.calibrate), "text": tuple(args.text)})

    import torch

    from anabranch.convert.job import convert

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    outcome = convert(settings)
    if args.json:
        print(json.dumps({"out": str(settings.out), **asdict(outcome)}))
    else:
        print("\n".join(lines(settings, outcome)))
    return INTERRUPTED if outcome.interrupted else 0


def lines(settings: ConvertSettings, outcome: "Outcome") -> list[str]:
    """An outcome for people."""
    (before, after), (old, new) = outcome.key_heads, outcome.cache_bytes
    lost = " ".join(f"{error:.1%}" for error in outcome.errors)
    said = [
        f"{settings.out}: {before} -> {after} K heads by {settings.method}; cache {old} -> {new} bytes per token",
        f"energy of the keys lost, by layer: {lost}",
    ]
    if outcome.merged is not None:
        said += [
            f"{outcome.merged.tokens} tokens of {'held-out ' if settings.heal else ''}text, against the original:",
            f"  {'original':10} perplexity {outcome.merged.perplexity_original:8.3f}",
            _line("merged", outcome.merged),
        ]
    if outcome.healed is not None:
        said.append(_line("healed", outcome.healed) + f"  after {outcome.steps} steps in {outcome.seconds:.0f} s")
    if outcome.interrupted:
        said.append(f"healing stopped at step {outcome.steps} of {settings.heal}; go on with --resume")
    return said


def _line(name: str, measured: "Agreement") -> str:
    return (
        f"  {name:10} perplexity {measured.perplexity:8.3f}  KL {measured.kl:.5f} nats  "
        f"same best token {measured.same_top:.1%}"
    )
