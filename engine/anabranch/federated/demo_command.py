"""`anabranch demo robust`: twenty clients learn to read digits, six of them hostile."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.common.files import check_targets, replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from anabranch.federated.demo import Course, Settings
    from anabranch.federated.private import Private

EXAMPLES = """examples:
  anabranch demo robust                                  20 clients, 6 of them hostile; some seconds
  anabranch demo robust --hostile 9 --seed 3
  anabranch demo robust --json robust.json --plot robust.png
"""
HELP = {
    "clients": "clients in all",
    "hostile": "how many of them are hostile, in three ways",
    "rounds": "rounds of training",
    "seed": "of the data's parts and the first weights",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand for each demonstration."""
    parser.epilog = EXAMPLES
    demos = parser.add_subparsers(title="demonstrations", dest="demo", metavar="DEMO", required=True)
    summary = "what hostile clients do to the mean, and what robust rules do about it"
    robust = demos.add_parser(
        "robust", help=summary, description=f"Show {summary}.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, text in HELP.items():
        robust.add_argument(f"--{name}", type=int, help=text)
    robust.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=True,
        help="compute the last aggregate once more as a secure sum (needs the extra `secure`)",
    )  # fmt: skip
    robust.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    robust.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracies as a PNG (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Train under each rule, print the accuracies, write what was asked for."""
    from anabranch.federated import demo

    given = {name: getattr(args, name) for name in HELP if getattr(args, name) is not None}
    settings = demo.Settings(**given)
    if args.private:
        from anabranch.federated import private  # says so now if its libraries are missing
    if args.plot:
        _figure()  # says so now if matplotlib is missing
    check_targets(path for path in (args.json, args.plot) if path)
    courses = demo.run(settings)
    print(to_text(settings, demo.kinds_of_hostile(settings.hostile), courses))
    if args.private:
        course = courses["geometric median"]
        print(private_text(private.aggregate_privately(course.updates, course.coefficients), course.update))
    if args.json:
        _write_json(args.json, settings, courses)
    if args.plot:
        _draw(args.plot, courses)
    return 0


def to_text(settings: "Settings", kinds: Mapping[str, int], courses: Mapping[str, "Course"]) -> str:
    """The accuracies, a line for each round, and what they come to."""
    who = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "none"
    lines = [f"{settings.clients} clients learn to read digits. {settings.hostile} are hostile: {who}.", ""]
    lines.append("accuracy   " + "   ".join(courses))
    for i in range(settings.rounds + 1):
        cells = (f"{course.accuracy[i]:{len(name)}.1%}" for name, course in courses.items())
        lines.append(f"round {i:<5}" + "   ".join(cells))
    lines.append("")
    lines += [f"{name}: {course.accuracy[-1]:.1%}" for name, course in courses.items()]
    return "\n".join(lines)


def private_text(private: "Private", update: "Tensor") -> str:
    """What the secure sum of the last round came to, beside the geometric median that the server found itself."""
    exact = "bit for bit" if private.is_exact else "NOT"
    off = float((private.update - update).norm() / update.norm())
    return (
        f"\nthe last geometric median once more, privately: {len(private.update)} numbers of {len(private.accepted)} "
        f"clients, proof {private.proof}\nthe sum is {exact} that of the quantised updates; "
        f"weights in whole numbers put it {off:.1%} of its length beside the median"
    )


def _write_json(path: Path, settings: "Settings", courses: Mapping[str, "Course"]) -> None:
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "accuracy": {name: course.accuracy for name, course in courses.items()},
    }
    replace_file(path, lambda part: part.write_text(json.dumps(report, indent=1) + "\n"))


def _draw(path: Path, courses: Mapping[str, "Course"]) -> None:
    figure = _figure()
    axes = figure.subplots()
    for name, course in courses.items():
        axes.plot(course.accuracy, label=name, linestyle="--" if "nobody" in name else "-")
    axes.set(xlabel="round", ylabel="accuracy on digits that no client holds", ylim=(0, 1))
    axes.legend()
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=150))


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'anabranch[plot]'") from error
    return Figure(figsize=(7, 4.2), layout="constrained")
