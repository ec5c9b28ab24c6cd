"""What merging K heads costs, and what healing gives back: each count of heads by each method, on the same text.

    python -m anabranch.convert.study MODEL --text stories/text --calibrate stories/calibration \\
        --runs runs/convert --json figures.json --report page.md

Finished conversions are skipped and an unfinished one goes on, so the command can be repeated until it is done.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.common import run_state
from anabranch.common.checkpoint import read_json, write_json
from anabranch.common.page import write_tables
from anabranch.convert.settings import ConvertSettings
from anabranch.models.config import ModelConfig

INTERRUPTED = 130  # 128 + SIGINT
REPORT = "conversion.json"


def plan(base: ConvertSettings, k_heads: int, calibrate: tuple[str, ...]) -> dict[str, ConvertSettings]:
    """The conversions of a model with that many K heads by name; `base` has what they share, `out` their folder.

    Keeping all heads is one of them, as a check: it needs no healing.
    """
    runs = {"unchanged": replace(base, key_heads=k_heads, out=base.out / "unchanged", plot=False)}
    for heads in (n for n in range(k_heads - 1, 0, -1) if k_heads % n == 0):
        for name, changes in (
            ("mean", {"method": "mean"}),
            ("svd", {"method": "svd"}),
            ("svd, calibrated", {"method": "svd", "calibrate": calibrate}),
        ):
            out = base.out / f"{heads}-{name.replace(', ', '-')}"
            runs[f"{heads} {name}"] = replace(base, key_heads=heads, out=out, **changes)
    return runs


def finished(settings: ConvertSettings) -> bool:
    """Whether the folder of a conversion holds the report of exactly this one."""
    path = settings.out / REPORT
    return path.is_file() and read_json(path)["recipe"] == settings.recipe()


def collect(runs: dict[str, ConvertSettings]) -> dict[str, Any]:
    """The reports of all conversions, and once what they share."""
    reports = {name: read_json(settings.out / REPORT) for name, settings in runs.items()}
    last = list(reports.values())[-1]
    texts = {report["text_sha256"][0] for report in reports.values()}
    if len(texts) > 1:
        raise ValueError("the conversions were measured on different texts; remove their folder and start again")
    shared = {key: last[key] for key in ("training_tokens", "calibration_tokens", "text_sha256", "torch")}
    recipe = {key: x for key, x in last["recipe"].items() if key not in ("key_heads", "method")}
    kept = ("key_heads", "cache_bytes", "errors", "merged", "healed")
    return {
        **shared,
        "recipe": recipe,
        "conversions": [{"name": name, **{key: x[key] for key in kept}} for name, x in reports.items()],
    }


def markdown(figures: dict[str, Any]) -> str:
    """One row for each conversion."""
    first = figures["conversions"][0]["merged"]
    steps, batch = figures["recipe"]["steps"], figures["recipe"]["batch"]
    lines = [
        f"{first['tokens']} tokens of held-out text, on which the original has perplexity "
        f"{first['perplexity_original']:.3f}. Healed: {steps} steps of {batch} windows.",
        "",
        "| K heads | method | cached bytes per token | keys' energy lost | merged: KL | perplexity | same best token "
        "| healed: KL | perplexity | same best token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["conversions"]:
        method = row["name"].partition(" ")[2] or row["name"]
        lost = sum(row["errors"]) / len(row["errors"])
        cells = [str(row["key_heads"][1]), method, str(row["cache_bytes"][1]), f"{lost:.1%}"]
        cells += _agreement(row["merged"]) + _agreement(row["healed"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _agreement(measured: dict[str, float] | None) -> list[str]:
    if measured is None:
        return ["–"] * 3
    return [f"{measured['kl']:.4f}", f"{measured['perplexity']:.3f}", f"{measured['same_top']:.1%}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert what is missing, then write the figures; 130 when healing was interrupted."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m anabranch.convert.study",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument(
        "--text", nargs="+", required=True, help="files, folders or patterns to heal with and measure on"
    )
    parser.add_argument("--calibrate", nargs="+", required=True, help="other files to calibrate on")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the converted models")
    parser.add_argument("--json", type=Path, required=True, help="figures go here")
    parser.add_argument("--report", type=Path, required=True, help="Markdown page whose tables are replaced")
    parser.add_argument("--heal", type=int, default=300, help="steps of healing (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads torch computes with (default: 1)")
    args = parser.parse_args(argv)

    import torch

    from anabranch.convert.job import convert

    torch.set_num_threads(args.threads)
    base = ConvertSettings(
        model=args.model,
        out=args.runs,
        key_heads=1,
        text=tuple(args.text),
        heal=args.heal,
        batch=args.batch,
        lr=args.lr,
    )
    runs = plan(base, ModelConfig.load(args.model).k_heads, tuple(args.calibrate))
    for name, settings in runs.items():
        if finished(settings):
            continue
        print(name, flush=True)
        if convert(replace(settings, resume=run_state.exists(settings.state_folder))).interrupted:
            print("stopped; the same command goes on")
            return INTERRUPTED
    figures = collect(runs)
    write_json(args.json, figures)
    write_tables(args.report, markdown(figures))
    print(markdown(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
