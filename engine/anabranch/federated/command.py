"""`anabranch federated`: methods of federated learning on data whose labels are partly wrong."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.federated.options import default_of
from anabranch.federated.plan import Plan, read_plan
from anabranch.federated.schedule import Schedule
from anabranch.federated.tree import command as tree

if TYPE_CHECKING:
    from anabranch.federated.experiment import Results

INTERRUPTED = 130  # 128 + SIGINT
EXAMPLES = """examples:
  anabranch federated run --noise pairflip:0.4 --seeds 5
  anabranch federated run --method fedcfa --set decorrelation=0.2 --data cifar10n=PATH --noise human:worse --network cnn
  anabranch federated run --data photos/ --picture-size 32 --network cnn --partition dirichlet:0.5 --out runs/photos
  anabranch federated bench --method fedavg fedcfa --noise clean pairflip:0.4 symmetric:0.6@half --seeds 5 --out runs/b
  anabranch federated bench --config bench.toml --out runs/b --resume
  anabranch federated run --method co-teaching --noise pairflip:0.4 --secure privacy=2,dropouts=1
  anabranch federated tree --bridge pca:32 --seeds 5
  anabranch federated methods
"""
HELP = {
    "data": "digits, digits-shortcut, NAME=PATH or PATH: fashion-mnist, cifar10n, banking77, ag-news; an .npz with x "
    "and y; a folder of folders of pictures; a folder saved by `datasets`",
    "data_root": "folder that holds the published data under their names",
    "picture_size": "pixels a side that pictures of folders are resized to",
    "clients": "clients in all",
    "partition": "iid, shards:S, dirichlet:ALPHA, owners, resample:N",
    "minimum": "samples that each client has at least",
    "network": "mlp, cnn, resnet10, resnet18 or text",
    "hidden": "widths of the perceptron's layers, as 64,64",
    "rounds": "rounds in all",
    "share": "of the clients that train in a round",
    "epochs": "epochs of a client in a round",
    "batch": "samples of a step",
    "drop_last": "whether clients leave out what does not fill a batch",
    "lr": "of the clients' SGD",
    "momentum": "of the clients' SGD",
    "weight_decay": "of the clients' SGD",
    "decorrelation": "times how much features of a batch go together, added to any method's loss; FNBench has 0.1",
    "augment": "whether samples are shown shifted, mirrored or with a little noise",
    "secure": "sum updates so that the server learns nothing else, as privacy=2,dropouts=1 (needs the extra `secure`)",
    "seeds": "runs of each method and noise",
    "seed": "of the first run",
    "evaluate_every": "rounds between looks at the test; the last round is always looked at",
    "threads": "that train clients; the results do not depend on them (default: one a core)",
    "out": "folder for checkpoints, models, results.json, results.md and report.html",
}
BOOLEANS = ("drop_last", "augment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand for a run, one for a comparison, one that lists methods."""
    parser.epilog = EXAMPLES
    commands = parser.add_subparsers(title="what to do", dest="federated", metavar="WHAT", required=True)
    summaries = {
        "run": "train by one method, on one kind of noise",
        "bench": "compare methods on kinds of noise, seed by seed",
        "methods": "list the methods and their options",
    }
    for name, summary in summaries.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name != "methods":
            _add_plan(command, many="+" if name == "bench" else None)
    tree.add_arguments(commands.add_parser("tree", help=tree.SUMMARY))


def _add_plan(command: argparse.ArgumentParser, *, many: str | None) -> None:
    add, known = command.add_argument, {field.name: field for field in (*fields(Plan), *fields(Schedule))}
    add("--config", type=Path, metavar="FILE", help="TOML with the same names; what stands here beside it comes first")
    add("--method", nargs=many, metavar="NAME[:option=value,...]", help="see `anabranch federated methods`")
    if not many:
        add("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the method")
    add(
        "--noise", nargs=many, metavar="NOISE",
        help="clean, symmetric:RATE, pairflip:RATE, asymmetric:RATE, instance:RATE, human:NAME; a range as 0.0-0.4 "
        "rises from client to client; @half, @20 or @30%% limits it to so many clients; groups are joined by commas",
    )  # fmt: skip
    for name, text in HELP.items():
        default = default_of(known[name])
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        add(f"--{name.replace('_', '-')}", dest=name, metavar="true|false" if name in BOOLEANS else None,
            help=text if default is None else f"{text} (default: {str(shown).lower()})")  # fmt: skip
    add("--resume", action="store_const", const=True, help="go on with what --out holds")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write what was asked for; 130 after Ctrl-C."""
    if args.federated == "methods":
        print(list_methods())
        return 0
    from anabranch.common.memory import keep_freed_memory

    keep_freed_memory()
    if args.federated == "tree":
        return tree.run(args)
    names = [*HELP, "method", "noise", "resume"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.federated == "run":
        given = {name: [value] if name in ("method", "noise") else value for name, value in given.items()}
    plan, chosen = read_plan(args.config, given)
    if args.federated == "run" and (len(plan.method) > 1 or len(plan.noise) > 1):
        raise ValueError("run takes one method and one noise; bench compares several")

    from anabranch.common.interrupt import interruptible
    from anabranch.data.sources import load, parse_source
    from anabranch.federated.choices import choose_method
    from anabranch.federated.experiment import compare
    from anabranch.federated.options import pairs_of

    if args.federated == "run":
        chosen = {**chosen, **pairs_of(args.set)}
        methods = [choose_method(plan.method[0], chosen)]
    else:  # a table of options for each method
        methods = [choose_method(text, chosen.pop(text.partition(":")[0], {})) for text in plan.method]
        if chosen:
            raise ValueError(f"options are set for methods that are not compared: {sorted(chosen)}")
    data = load(parse_source(plan.data, plan.data_root), picture_size=plan.picture_size)
    with interruptible() as interrupted:
        results = compare(plan, methods, data, interrupted=interrupted, progress=args.progress)
    _tell(results, as_json=args.json)
    return INTERRUPTED if results.interrupted else 0


def _tell(results: "Results", *, as_json: bool) -> None:
    from anabranch.federated import report, tables
    from anabranch.federated.telling import tell

    tell(
        tables.numbers(results), results.plan.out, as_json=as_json, text=lambda: tables.to_text(results),
        markdown=lambda: tables.to_markdown(results), page=lambda: report.page(results),
    )  # fmt: skip


def list_methods() -> str:
    """Name, what it is, and options, of each method."""
    from anabranch.federated.choices import METHODS, method_class

    lines = [
        "A robust rule may take the place of any method's mean, as NAME:mean.rule=geometric-median or",
        "NAME:mean.rule=trimmed-mean,mean.f=3, but of methods that make their own of all models.",
        "",
    ]
    for name in sorted(METHODS):
        cls = method_class(name)
        told = cls.__doc__ if cls.__module__.endswith(".method") else import_module(cls.__module__).__doc__
        about = (told or "").strip().split("\n")[0]
        lines += [name, f"    {about}", *_options(cls, METHODS[name][1])]
    return "\n".join(lines)


def _options(cls: Any, presets: Mapping[str, Any]) -> Sequence[str]:
    """The options that have a value, those of an option with its name and a dot before."""
    from anabranch.federated.options import make

    told = []
    for name, value in asdict(make(cls, presets, what=cls.__name__)).items():
        inner = {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        told += [f"{key}={x}" for key, x in inner.items() if x is not None and x != ()]
    return [f"    {', '.join(told)}"] if told else []
