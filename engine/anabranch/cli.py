"""The command `anabranch`: one subcommand per job, each defined beside the code that does it.

A subcommand is a module with `add_arguments(parser)`, which also gives the parser its examples, and `run(args) -> int`.
Whatever is heavy (torch first of all) is imported inside `run`, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from anabranch.aggregate import command as aggregate
from anabranch.aggregate.secure import command as secagg
from anabranch.bench import command as bench
from anabranch.convert import command as convert
from anabranch.federated import command as federated
from anabranch.federated import demo_command as demo
from anabranch.serve import generate_command as generate
from anabranch.serve import serve_command as serve
from anabranch.train import command as train_lm
from anabranch.tune import command as tune
from anabranch.version import __version__

EXAMPLES = """examples:
  anabranch generate --prompt "import os"          the small model in the package
  anabranch generate ./Llama-3.2-1B --prompt "Once upon a time" --max-tokens 200
  anabranch serve ./Qwen3-0.6B --port 8080
  anabranch train-lm --help                        train a small DiffQKV model on text files
  anabranch tune --help                            LoRA, SMoRA or TriAdaptLoRA on instructions
  anabranch convert --help                         fewer K heads for a Llama, Mistral or Qwen2 checkpoint
  anabranch aggregate --help                       robust rules over many clients' safetensors files
  anabranch bench attention --quick                kernels against torch and this machine's bandwidth
  anabranch federated --help                       federated methods on labels that are partly wrong
  anabranch demo robust                            20 clients learn to read digits, 6 of them hostile
"""
COMMANDS = (
    ("generate", "stream text from a model folder and say how fast it was", generate),
    ("serve", "answer OpenAI's HTTP API over a model folder", serve),
    ("train-lm", "train a small byte-level DiffQKV model on text files", train_lm),
    ("tune", "train low-rank adapters of a model on a JSONL file", tune),
    ("convert", "merge the K heads of a checkpoint, measure what it costs and heal it", convert),
    ("aggregate", "one safetensors file from many clients' by a robust rule", aggregate),
    ("secagg", "try out secure, verifiable sums of vectors", secagg),
    ("bench", "measure kernels and the engine beside their peers", bench),
    ("federated", "train and compare federated methods on noisy labels", federated),
    ("demo", "show in some seconds what robust aggregation is good for", demo),
)
INTERRUPTED = 130  # 128 + SIGINT
READER_LEFT = 141  # 128 + SIGPIPE


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; `args.run` is the chosen one's entry."""
    parser = argparse.ArgumentParser(
        prog="anabranch",
        description="Inference with fewer key heads than value heads; robust and private aggregation; on CPU and GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"anabranch {__version__}")
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, summary, module in COMMANDS:
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return int(status)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `anabranch … | head`: keep the interpreter from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"anabranch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
