"""The command lines of SMoRA's studies: the arguments that they share, and what is done with their figures."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.common.checkpoint import write_json
from anabranch.common.files import check_targets
from anabranch.common.page import write_tables

INTERRUPTED = 130  # 128 + SIGINT
VALIDATION = 1000  # the seed that chooses the rates

Figures = Mapping[str, Any]


def study_parser(
    module: str, doc: str | None, *, tables: str, seeds: Sequence[int], steps: int
) -> argparse.ArgumentParser:
    """Of `python -m module`. `tables`: the name that its tables have in a page; the others are defaults."""
    summary, _, rest = (doc or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of what is trained")
    add("--json", type=Path, required=True, help="figures go here")
    add("--report", type=Path, help=f"Markdown page whose tables named `{tables}` are replaced")
    add("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")
    add("--seeds", type=int, nargs="+", default=list(seeds), help=f"default: {' '.join(map(str, seeds))}")
    add("--steps", type=int, default=steps, help="steps of each run (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads torch computes with (default: 1)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, if what they ask for can be done in the end."""
    args = parser.parse_args(argv)
    if len(set(args.seeds)) != len(args.seeds) or VALIDATION in args.seeds:
        parser.error(f"seeds must differ from each other and from {VALIDATION}, which chooses the rates")
    if args.plot:
        from anabranch.common import plot  # noqa: F401  (fails now rather than after minutes, when matplotlib is missing)
    check_targets(path for path in (args.json, args.report, args.plot) if path)
    return args


def publish(
    args: argparse.Namespace,
    figures: Figures | None,
    *,
    page: Callable[[Figures], str],
    tables: str,
    draw: Callable[[Path, Figures], None],
) -> int:
    """Write the figures where they were asked for; the command's status. None for a study that was interrupted."""
    if figures is None:
        print("stopped; the same command goes on")
        return INTERRUPTED
    write_json(args.json, figures)
    if args.report:
        write_tables(args.report, page(figures), tables)
    if args.plot:
        draw(args.plot, figures)
    print(page(figures))
    return 0
