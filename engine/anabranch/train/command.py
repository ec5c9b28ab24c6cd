"""train a small byte-level DiffQKV model on text files; resumable

examples:
  anabranch train-lm --out runs/stdlib --plot                     Python's own standard library
  anabranch train-lm notes/ 'src/**/*.py' --out runs/mine --steps 2000
  anabranch train-lm --out runs/stdlib --plot --resume            go on after Ctrl-C or a time limit
  anabranch train-lm --out runs/stdlib --time-limit 45m           stop in time, with a checkpoint

The folder given by --out becomes a model folder: anabranch generate runs/mine --prompt "def "
"""

import argparse
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from anabranch.train.settings import LMSettings, flag

INTERRUPTED = 130  # 128 + SIGINT
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

# One line of help per option, in the order of LMSettings.
HELP = {
    "held_out": "share of the text kept from training to measure on, in whole files",
    "hidden_size": "width of the model",
    "ffn_size": "width of the feed-forward layers",
    "layers": "number of layers",
    "q_heads": "query heads",
    "k_heads": "key heads; must divide the query heads",
    "v_heads": "value heads; must divide the query heads",
    "head_dim": "width of every head",
    "q_intermediate_size": "width of the gated MLP on the query (AugQ), or none",
    "augq_residual": "add the query to its MLP instead of replacing it",
    "context": "bytes a sequence is long",
    "batch": "sequences per step",
    "steps": "steps in all; may be changed when resuming",
    "warmup": "steps in which the learning rate rises",
    "lr": "highest learning rate",
    "final_lr": "last learning rate, as a share of the highest",
    "weight_decay": "AdamW's decay of the matrices",
    "beta1": "AdamW's first moment",
    "beta2": "AdamW's second moment",
    "clip": "largest norm of the gradient",
    "init_std": "spread of the first weights, or none for 1/sqrt(hidden size)",
    "seed": "of the weights and of the order of the text",
    "weights": "dtype of the model written: bfloat16 or float32",
    "device": "torch device to train on",
    "log_every": "steps between entries of loss.jsonl",
    "evaluate_every": "steps between measurements on the held-out text",
    "evaluate_windows": "windows of it that are measured",
    "checkpoint_every_s": "time between checkpoints, as 90, 5m or 1h",
    "time_limit_s": "stop after this time with a checkpoint, as 90, 45m or 2h; none never stops",
    "resume": "go on from the checkpoint in --out",
    "plot": "draw loss.png (needs matplotlib: the extra `plot`)",
    "progress": "show a progress bar",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of LMSettings, and torch's threads."""
    parser.epilog = (__doc__ or "").partition("\n\n")[2]
    parser.add_argument(
        "text",
        nargs="*",
        default=(),
        help="files, folders or patterns; without any, the standard library of this Python",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its log and its checkpoint")
    parser.add_argument("--threads", type=int, help="threads torch computes with (default: torch's choice)")
    for field in fields(LMSettings):
        if field.name in HELP:
            _add(parser, field.name, field.default)


def settings_from(args: argparse.Namespace) -> LMSettings:
    """The settings that parsed arguments ask for."""
    values = {field.name: getattr(args, field.name) for field in fields(LMSettings)}
    return LMSettings(**{**values, "text": tuple(args.text)})


def run(args: argparse.Namespace) -> int:
    """Train and say in a few lines how it went; 130 after Ctrl-C."""
    settings = settings_from(args)

    import torch

    from anabranch.train.lm import train

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    outcome = train(settings)
    if outcome.stopped is not None:
        print(f"stopped by {outcome.stopped} at step {outcome.steps} of {settings.steps}; go on with --resume")
    if outcome.stopped == "interrupted":
        return INTERRUPTED
    print(
        f"{settings.out}: held-out bits per byte {outcome.held_out_bits_per_byte:.4f}, "
        f"as stored in {settings.weights} {outcome.stored_bits_per_byte:.4f}"
    )
    return 0


def duration_s(text: str) -> float:
    """Seconds of '90', '90s', '45m' or '2h'."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a time is a number with s, m or h, such as 90, 45m or 2h; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _add(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    assert default is not MISSING
    text = HELP[name]
    if isinstance(default, bool):
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag(name), dest=name, action=action, default=default, help=text)
        return
    kind: Any = duration_s if name.endswith("_s") else type(default)
    if name in ("q_intermediate_size", "init_std", "time_limit_s"):
        kind = _or_none({"q_intermediate_size": int, "init_std": float, "time_limit_s": duration_s}[name])
    shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else default
    parser.add_argument(flag(name), dest=name, type=kind, default=default, help=f"{text} (default: {shown})")


def _or_none(kind: Any) -> Any:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")  # argparse names it in its error
    return parse
