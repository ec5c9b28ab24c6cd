"""`anabranch secagg simulate`: secure, verifiable sums of vectors (SVAFD-style), tried out in one process."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.aggregate.secure.simulate import Report

EXAMPLES = """examples:
  anabranch secagg simulate --clients 32 --length 1000000 --drop 8 --corrupt 2
  anabranch secagg simulate --clients 32 --length 1000000 --drop 8 --blocks 16 --mode mask --json
"""
FIELDS = ("babybear", "koalabear", "m31", "goldilocks", "f50")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand, `simulate`."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    simulate = kinds.add_parser(
        "simulate",
        help="run rounds with all parties in this process and time each step",
        description="Run rounds with all parties in this process, compare each sum with that of plain integers, and "
        "time each step of a client and of the server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument("--clients", type=int, default=32, help="N (%(default)s)")
    simulate.add_argument("--length", type=int, default=100_000, help="numbers in a vector (%(default)s)")
    simulate.add_argument("--drop", type=int, default=0, help="D clients that fall silent (%(default)s)")
    simulate.add_argument("--corrupt", type=int, default=0, help="E clients that send wrong sums (%(default)s)")
    simulate.add_argument("--blocks", type=int, help="K pieces of a vector (default: the most possible, up to N / 2)")
    simulate.add_argument("--privacy", type=int, help="T clients may collude with the server (default: N / 4)")
    simulate.add_argument("--mode", choices=("direct", "mask"), default="direct", help="what is coded (%(default)s)")
    simulate.add_argument("--proof", choices=("V0", "V1", "V2"), default="V2", help="what is checked (%(default)s)")
    simulate.add_argument("--field", choices=FIELDS, default="babybear", help="(%(default)s)")
    simulate.add_argument(
        "--drop-at", choices=("share", "check", "agree", "sum", "project"), default="sum",
        help="the first step that silent clients miss (%(default)s)",
    )  # fmt: skip
    simulate.add_argument("--rounds", type=int, default=3, help="of which the medians are shown (%(default)s)")
    simulate.add_argument("--threads", type=int, default=1, help="threads of a party (%(default)s)")
    simulate.add_argument("--json", action="store_true", help="write every number to standard output instead")


def run(args: argparse.Namespace) -> int:
    """Simulate and show; 1 if a sum was not exact."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch would wait where others should hash
    import torch

    from anabranch.aggregate.secure.simulate import Settings, simulate

    torch.set_num_threads(args.threads)
    chosen = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if hasattr(args, name)}
    report = simulate(Settings(**chosen), progress=lambda line: print(line, file=sys.stderr))
    print(json.dumps(report.numbers(), indent=1) if args.json else to_text(report))
    return 0 if report.exact else 1


def to_text(report: "Report") -> str:
    """A table of the steps, and what came of them."""
    settings = report.settings
    header = ("step", "client ms", "slowest", "server ms", "receiving", "KiB up", "KiB down")
    rows = [
        (
            phase.name,
            f"{phase.client_s * 1e3:.2f}",
            f"{phase.slowest_client_s * 1e3:.2f}",
            f"{phase.server_s * 1e3:.2f}",
            f"{phase.server_receive_s * 1e3:.2f}",
            f"{phase.bytes_up / 1024:.1f}",
            f"{phase.bytes_down / 1024:.1f}",
        )
        for phase in report.phases
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    wrong = ", ".join(map(str, report.wrong)) or "none"
    return "\n".join(
        [
            f"N={settings.clients} K={report.blocks} T={report.privacy} E={settings.corrupt} D={settings.drop}, "
            f"{settings.length} numbers, {settings.field}, {settings.mode}, {settings.proof}",
            "",
            *lines,
            "",
            f"client {report.client_s * 1e3:.1f} ms a round, {report.verified:.0%} of it for the proof; "
            f"server {report.server_s * 1e3:.1f} ms for the sum and its proof",
            f"finding wrong sums {report.location_s * 1e3:.2f} ms, decoding {report.decode_s * 1e3:.2f} ms",
            f"{len(report.accepted)} vectors in the sum, wrong sums from {wrong}, "
            f"{'equal to' if report.exact else 'DIFFERENT FROM'} the sum of the integers",
        ]
    )
