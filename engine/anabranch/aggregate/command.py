"""`anabranch aggregate`: one safetensors file from many clients', by a rule that a minority of them cannot bend."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.aggregate.settings import MIXES, RULES, AggregateMethod, AggregateOptions
from anabranch.common.files import check_targets, replace_file

if TYPE_CHECKING:
    from anabranch.aggregate.report import Report

MODES = ("whole", "per-tensor")
PARAMETERS: dict[str, tuple[Callable[[str], Any], str]] = {  # fields of AggregateMethod
    "f": (int, "clients that may send anything"),
    "tol": (float, "bound that the geometric median must reach (default: 1e-6)"),
    "neighbours": (int, "that count in a Krum score (default: N - f - 2)"),
    "chosen": (int, "best clients that multi-krum averages (default: N - f)"),
    "radius": (float, "that centred-clipping cuts differences from the base to"),
    "steps": (int, "of centred-clipping (default: 1)"),
    "confidence": (float, "kappa of foolsgold (default: 1)"),
    "step": (float, "length of sign-majority's step in every coordinate (default: 1)"),
    "bucket": (int, "clients of a bucket, for bucketing"),
    "seed": (int, "of the drawing of buckets (default: 0)"),
    "clip": (float, "that static-clipping cuts updates to"),
}
EXAMPLES = """examples:
  anabranch aggregate -o out.safetensors client-*.safetensors             the geometric median
  anabranch aggregate --rule krum --f 2 --base last.safetensors -o out.safetensors a.safetensors b.safetensors
  anabranch aggregate --pre nnm --f 2 --json - -o out.safetensors runs/a runs/b runs/c runs/d runs/e
  anabranch aggregate --rule mean --weights 100 250 75 -o out.safetensors a.safetensors b.safetensors c.safetensors
  anabranch aggregate --rule trimmed-mean --f 1 --plot clients.png -o out.safetensors client-*.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"{EXAMPLES}\noptions of the rules:\n{_options(RULES)}\n\noptions of the steps:\n{_options(MIXES)}\n"
    )
    add = parser.add_argument
    add("clients", nargs="+", metavar="CLIENT", help="safetensors file, or checkpoint folder, of one client")
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="safetensors file for the result")
    add("--rule", choices=tuple(RULES), default="geometric-median", help="(default: %(default)s)")
    add("--pre", action="append", choices=tuple(MIXES), default=[], help="step before the rule; may be repeated")
    add(
        "--mode", choices=MODES, default="whole",
        help="all tensors of a client as one vector, or each tensor by itself (default: %(default)s)",
    )  # fmt: skip
    add("--base", type=Path, metavar="FILE", help="last global model, which updates are differences from")
    add(
        "--weights", nargs="+", metavar="W",
        help="one per client, or a .json file with a list, or with an object of clients' names",
    )  # fmt: skip
    for name, (kind, text) in PARAMETERS.items():
        add(f"--{name}", type=kind, help=text)
    add("--own", metavar="CLIENT", help="the client whose neighbours nearest-neighbours averages")
    add("--root", metavar="CLIENT", help="the client that fltrust trusts")
    add(
        "--non-finite", choices=("raise", "drop"), default="raise",
        help="clients with Inf or NaN: refuse them, or leave them out and count them among f (default: %(default)s)",
    )  # fmt: skip
    add(
        "--distances", action=argparse.BooleanOptionalAction, default=True,
        help="also for the mean and rules of coordinates, which do not need them (default: yes)",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the report as JSON; - prints it instead of the table")
    add("--plot", type=Path, metavar="FILE", help="draw weights and distances (needs matplotlib: the extra `plot`)")
    add("--threads", type=int, help="threads that compute; one more reads (default: one less than torch's choice)")
    add("--progress", action=argparse.BooleanOptionalAction, default=None, help="a bar (default: on a terminal)")


def run(args: argparse.Namespace) -> int:
    """Aggregate, and say who weighed what; 130 after Ctrl-C."""
    method = AggregateMethod(
        rule=args.rule,
        pre=tuple(args.pre),
        weights=None if args.weights is None else read_weights(args.weights, args.clients),
        own=_index(args.own, args.clients, "--own"),
        root=_index(args.root, args.clients, "--root"),
        **{name: getattr(args, name) for name in PARAMETERS},
    )
    options = AggregateOptions(
        per_tensor=args.mode == "per-tensor", non_finite=args.non_finite, distances=args.distances
    )
    _check_outputs(args)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")

    import torch

    from anabranch.aggregate.job import aggregate_files
    from anabranch.common.interrupt import interruptible
    from anabranch.common.threads import torch_threads

    threads = args.threads or max(1, torch.get_num_threads() - 1)  # another reads
    with torch_threads(threads), interruptible() as stop, _bar(args.progress) as show:

        def progress(sweep: str, done: int, total: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            show(sweep, done, total)

        report = aggregate_files(args.clients, args.out, method, options, base=args.base, progress=progress)
    _say(report, args)
    return 0


def read_weights(words: Sequence[str], clients: Sequence[str]) -> tuple[float, ...]:
    """Numbers in the clients' order, or one JSON file: a list in that order, or an object by path or file name."""
    if len(words) == 1 and words[0].endswith(".json"):
        path = Path(words[0])
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if isinstance(found, dict):
            names = [client if client in found else Path(client).name for client in clients]
            missing, surplus = sorted(set(names) - found.keys()), sorted(found.keys() - set(names))
            if missing or surplus:
                raise ValueError(f"{path} must weigh every client and nothing else; {missing=}, {surplus=}")
            found = [found[name] for name in names]
        if not isinstance(found, list) or not all(type(w) in (int, float) for w in found):
            raise ValueError(f"{path} must hold a list of numbers, or an object of clients' names and numbers")
        return tuple(float(w) for w in found)
    try:
        return tuple(float(word) for word in words)
    except ValueError as error:
        raise ValueError(f"--weights takes numbers or one .json file, got {' '.join(words)}") from error


def _options(table: dict[str, tuple[str, ...]]) -> str:
    return "\n".join(
        f"  {name:19} {' '.join('--' + option for option in taken) or '–'}" for name, taken in table.items()
    )


def _index(client: str | None, clients: Sequence[str], option: str) -> int | None:
    if client is not None and client not in clients:
        raise ValueError(f"{option} must be one of the clients given, got {client}")
    return None if client is None else clients.index(client)


def _check_outputs(args: argparse.Namespace) -> None:
    """Say before the work that something cannot be written after it."""
    others = [Path(args.json)] if args.json not in (None, "-") else []
    others += [args.plot] if args.plot else []
    check_targets([args.out, *others])
    taken = [args.out, *map(Path, args.clients), *([args.base] if args.base else [])]
    for path in others:
        if path.resolve() in {other.resolve() for other in taken}:
            raise ValueError(f"{path} is the result or one of the files to read; choose another")
    if args.plot:
        import anabranch.common.plot  # noqa: F401


@contextmanager
def _bar(wanted: bool | None) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each sweep."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty() if wanted is None else not wanted
    with tqdm(unit="B", unit_scale=True, disable=hidden, file=sys.stderr, leave=False) as bar:

        def show(sweep: str, done: int, total: int) -> None:
            if bar.total != total or done < bar.n:
                bar.reset(total)
                bar.set_description(sweep)
            bar.update(done - bar.n)

        yield show


def _say(report: "Report", args: argparse.Namespace) -> None:
    text = json.dumps(report.to_json(), indent=1) + "\n"
    if args.json == "-":
        print(text, end="")
    else:
        print(f"{report.to_text()}\nwrote {args.out}")
        if args.json:
            replace_file(Path(args.json), lambda path: path.write_text(text, encoding="utf-8"))
    if args.plot:
        from anabranch.common.plot import draw_clients

        nothing = [float("nan")] * len(report.clients)
        shown = report.distances if report.weights is None else report.weights
        draw_clients(
            args.plot,
            [os.path.basename(client) for client in report.clients],
            nothing if shown is None else shown.tolist(),
            [nothing] * len(nothing) if report.pairwise is None else report.pairwise.tolist(),
            label="distance from the result" if report.weights is None else "weight",
        )
