"""`anabranch federated tree`: end devices, edges and a cloud learn from each other's predictions."""

import argparse
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from anabranch.federated import options
from anabranch.federated.plan import Plan
from anabranch.federated.schedule import Schedule
from anabranch.federated.tree.plan import SCHEDULE, FedEEC, TreePlan

if TYPE_CHECKING:
    from anabranch.federated.tree.experiment import TreeResults

INTERRUPTED = 130  # 128 + SIGINT
SUMMARY = "a tree of unlike models that learn from each other's predictions (FedEEC)"
EXAMPLES = """examples:
  anabranch federated tree --bridge pca:32 --seeds 5
  anabranch federated tree --bridge pca:32 --also rectify=off rectify=swap sequential=true,migrate=0.1 --averaging
  anabranch federated tree --tree 4 --networks mlp:16,mlp:256 --noise symmetric:0.4
  anabranch federated tree --data fashion-mnist=PATH --networks cnn,resnet10,resnet18 --rounds 5 --out runs/tree
"""
SETTINGS = {
    "networks": "one for each height, leaves first: mlp:16, mlp:64x32, cnn, resnet10, resnet18",
    "bridge": "what samples are known by: conv, pca:COMPONENTS, random (which leads nowhere)",
    "rectify": "repair of what teachers say wrongly: off, ring:LENGTH, swap, mix:SHARE",
    "temperature": "of predictions that are handed on",
    "ce": "weight of the cross-entropy on bridge samples",
    "beta": "weight of the distance from the teacher",
    "beta_inner": "the same of students that are no leaves (default: as --beta)",
    "gamma": "weight of the cross-entropy on a leaf's own samples",
    "migrate": "share of the leaves that move to another parent before each round but the first",
    "sequential": "true: one link after another, as published; false: siblings together",
}
TREE = {
    "tree": "nodes of each tier below the root, from the top",
    "public": "share of the samples that is put aside for the bridge",
}
PLAN = {
    "data": "digits, NAME=PATH or PATH, as for `anabranch federated run`; pictures or vectors",
    "data_root": "folder that holds the published data under their names",
    "picture_size": "pixels a side that pictures of folders are resized to",
    "partition": "of the leaves: iid, shards:S, dirichlet:ALPHA, owners, resample:N",
    "minimum": "samples that each leaf has at least",
    "seeds": "runs of each variant and noise",
    "threads": "that compute; the results do not depend on them (default: one a core)",
    "out": "folder for checkpoints, models, results.json, results.md and report.html",
}
RUN = {
    "rounds": "in all",
    "batch": "samples of a step",
    "lr": "of SGD",
    "momentum": "of SGD",
    "weight_decay": "of SGD",
    "seed": "of the first run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a comparison of trees."""
    parser.description, parser.epilog = f"{SUMMARY[0].upper()}{SUMMARY[1:]}.", EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    usual = TreePlan()
    for names, values in ((TREE, usual), (SETTINGS, usual.settings), (PLAN, usual.plan), (RUN, SCHEDULE)):
        for name, text in names.items():
            value = getattr(values, name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            add(
                f"--{name.replace('_', '-')}",
                dest=name,
                help=text if value is None else f"{text} (default: {str(shown).lower()})",
            )
    add("--noise", nargs="+", metavar="NOISE", help="of the labels, as for `anabranch federated run` (default: clean)")
    add(
        "--also", nargs="+", default=[], metavar="NAME=VALUE[,...]",
        help="further settings, each compared with those of the flags: names as above with _ for -, and their values",
    )  # fmt: skip
    add("--averaging", action="store_true", help="compare with the mean of the leaves' models, too")
    add("--resume", action="store_true", help="go on with what --out holds")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    add("--json", action="store_true", help="print one JSON object instead of tables")


def read_plan(args: argparse.Namespace) -> TreePlan:
    """The plan of the flags. ValueError says what is wrong with one."""

    def given(names: dict[str, str]) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    what = "the command line"
    usual = TreePlan()
    tiers = options.typed(tuple[int, ...], args.tree, what=f"{what}: tree") if args.tree else usual.tree
    schedule = options.make(Schedule, {**_values(SCHEDULE), **given(RUN)}, what=what)
    # A list on the command line, a text everywhere else.
    noise = tuple(args.noise) if args.noise else usual.plan.noise
    plan = options.make(
        Plan, {**_values(usual.plan, but=("schedule",)), **given(PLAN), "clients": tiers[-1]}, what=what
    )
    return TreePlan(
        tree=tiers, public=options.typed(float, args.public, what=f"{what}: public") if args.public else usual.public,
        also=tuple(args.also), averaging=args.averaging, settings=options.make(FedEEC, given(SETTINGS), what=what),
        plan=replace(plan, noise=noise, resume=args.resume, schedule=schedule),
    )  # fmt: skip


def _values(settings: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in but}


def run(args: argparse.Namespace) -> int:
    """Learn, print tables, write what was asked for; 130 after Ctrl-C."""
    plan = read_plan(args)

    from anabranch.common.interrupt import interruptible
    from anabranch.data.sources import load, parse_source
    from anabranch.federated.tree.experiment import compare

    data = load(parse_source(plan.plan.data, plan.plan.data_root), picture_size=plan.plan.picture_size)
    with interruptible() as interrupted:
        results = compare(plan, data, interrupted=interrupted, progress=args.progress)
    _tell(results, as_json=args.json)
    return INTERRUPTED if results.interrupted else 0


def _tell(results: "TreeResults", *, as_json: bool) -> None:
    from anabranch.federated.telling import tell
    from anabranch.federated.tree import report, tables

    tell(
        tables.numbers(results), results.plan.plan.out, as_json=as_json, text=lambda: tables.to_text(results),
        markdown=lambda: tables.to_markdown(results), page=lambda: report.page(results),
    )  # fmt: skip
