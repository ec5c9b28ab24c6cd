"""`anabranch tune`: train low-rank adapters of a model folder on a JSONL file."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.tune.settings import DTYPES, GATES, METHODS, TuneSettings

if TYPE_CHECKING:
    from anabranch.tune.job import Outcome

INTERRUPTED = 130  # 128 + SIGINT
EXAMPLES = """examples:
  anabranch tune ./Qwen3-0.6B --data pairs.jsonl --out ./adapter
  anabranch tune ./Qwen3-0.6B --method smora --rank 64 --chosen 8 --data chats.jsonl --held-out test.jsonl --out ./a
  anabranch tune ./Qwen3-0.6B --method triadapt --rank 8 --targets q_proj v_proj --data pairs.jsonl --out ./a --plot
  anabranch tune ./Qwen3-0.6B --data pairs.jsonl --out ./adapter --resume
  torchrun --nproc-per-node 2 -m anabranch tune ./Qwen3-0.6B --data pairs.jsonl --out ./adapter

  A line is {"messages": [...]}, {"conversations": [...]}, {"prompt": ..., "completion": ...}, {"text": ...} or
  {"instruction": ..., "input": ..., "output": ...}. What lora makes is a folder of PEFT's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    defaults = {field.name: field.default for field in fields(TuneSettings)}
    add = parser.add_argument
    add("model", type=Path, help="model folder")
    add(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="examples to learn from, a JSON object a line; a file named twice counts twice",
    )  # fmt: skip
    add("--held-out", type=Path, metavar="FILE", help="examples to measure on")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the adapters")
    add("--init-from", type=Path, metavar="DIR", help="begin with the adapters of a folder")
    add("--save-merged", type=Path, metavar="DIR", help="write the whole model, adapters added to its weights")
    add("--method", choices=METHODS, default="lora", help="(default: %(default)s)")
    add("--targets", nargs="+", default=["*"], help="layers: names, ends, patterns (default: all linear layers)")
    add("--chosen", type=int, help="experts, smora: blocks that a token picks (default: an eighth, at least two)")
    add("--gate", choices=GATES, default=defaults["gate"], help="experts, smora: (default: %(default)s)")
    add("--orthogonality", type=float, help="triadapt, adalora: weight of the penalty (default: 0; adalora: 0.5)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model's own weights (default: as stored)")
    add("--steps", type=int, help="steps of the optimiser (default: by --epochs)")
    for name, text in {
        "rank": "ranks of a layer; triadapt, adalora: their mean at the end",
        "alpha": "scale of the branch",
        "block": "experts: ranks of one",
        "balance": "experts, smora: step of the biases that even out use",
        "growth_every": "triadapt, adalora: steps between looks",
        "epochs": "times to go through the examples",
        "context": "tokens of a row",
        "batch": "rows of a pass",
        "accumulate": "passes of a step, on each process",
        "lr": "highest learning rate",
        "warmup": "share of the steps in which it rises",
        "final_lr": "last learning rate, as a share of the highest",
        "weight_decay": "AdamW's",
        "clip": "largest norm of the gradient",
        "seed": "of the order of examples and of initial values",
        "evaluate_every": "steps between measurements on the held-out examples",
    }.items():
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        add(flag, type=type(default), default=default, help=f"{text} (default: %(default)s)")
    add(
        "--checkpoint-every", dest="checkpoint_every_s", type=float, metavar="SECONDS", default=60.0,
        help="seconds between checkpoints (default: %(default)s)",
    )  # fmt: skip
    add(
        "--checkpoint-activations", action="store_true",
        help="compute activations again instead of keeping them: less memory for one more forward pass",
    )  # fmt: skip
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--plot", action="store_true", help="draw the log at each checkpoint (needs the extra `plot`)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    add("--device", default="cpu", help="torch device to train on (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Train and say what came of it; 130 after Ctrl-C."""
    values = {field.name: getattr(args, field.name) for field in fields(TuneSettings)}
    settings = TuneSettings(**{**values, "data": tuple(args.data), "targets": tuple(args.targets)})

    from anabranch.tune.job import tune

    with processes(settings.device) as rank:
        outcome = tune(settings)
    if rank == 0:
        print(json.dumps({"out": str(settings.out), **asdict(outcome)}) if args.json else lines(settings, outcome))
    return INTERRUPTED if outcome.interrupted else 0


@contextmanager
def processes(device: str) -> Iterator[int]:
    """Meet the other processes that torchrun started, if it did; this one's rank. Each takes a GPU of its own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def lines(settings: TuneSettings, outcome: "Outcome") -> str:
    """An outcome for people."""
    if outcome.interrupted:
        return f"stopped at step {outcome.steps}; go on with --resume"
    said = [f"{settings.out}: {settings.method} of {outcome.parameters:,} parameters after {outcome.steps} steps"]
    if outcome.cut or outcome.dropped:
        said.append(
            f"of {outcome.examples + outcome.dropped} examples {outcome.cut} are longer than {settings.context} tokens "
            f"and were cut; {outcome.dropped} had nothing to learn within them and were left out"
        )
    said.append(f"training loss {outcome.train_loss:.4f} nats per learnt token")
    if outcome.held_out_loss is not None:
        said.append(f"held-out loss {outcome.held_out_loss:.4f}, perplexity {outcome.held_out_perplexity:.4g}")
    said.append(f"{outcome.examples_per_s:.4g} examples/s, {outcome.tokens_per_s:.4g} tokens/s")
    if outcome.ranks is not None:
        said.append("ranks " + " ".join(f"{name}:{rank}" for name, rank in outcome.ranks.items()))
    return "\n".join(said)
