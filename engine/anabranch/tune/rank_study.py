"""Does TriAdapt put ranks where they are needed, and what does it cost? Beside uniform LoRA and AdaLoRA.

    python -m anabranch.tune.rank_study --runs runs/ranks --model stories260k --data data \\
        --json figures.json --report page.md --plot figures.png

Twelve linear layers with teachers of rank 1 to 12 (rank_teachers.py), and two tasks of sorting texts (rank_texts.py).
Methods of a seed see the same teachers, the same stream and the same order of texts. Finished runs are skipped, so the
command can be repeated until it is done.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.common.checkpoint import read_json, write_json
from anabranch.common.files import check_targets
from anabranch.common.page import write_tables

Job = tuple[dict[str, Any], Callable[..., Any]]  # what it is, and what does it, given what to call after each step
PARTS = ("teachers", "texts")
SEEDS = {"teachers": (0, 1, 2, 3, 4), "texts": (0, 1, 2)}


def run_teachers(runs: Path, seeds: Sequence[int], *, steps: int | None, progress: bool) -> list[dict[str, Any]]:
    """Every method on every seed, in that order; what is there is not done again."""
    from anabranch.tune.rank_teachers import TeacherSettings, learn, variants

    s = TeacherSettings() if steps is None else TeacherSettings(steps=steps)
    jobs: list[Job] = [
        (
            {"method": name, "seed": seed, "by": by, "settings": asdict(s), "made": asdict(made)},
            partial(learn, s, name, made, by, seed),
        )
        for seed in seeds
        for name, (made, by) in variants(s).items()
    ]
    return run_jobs(runs / "teachers", jobs, s.steps, progress=progress)


def run_texts(
    runs: Path, seeds: Sequence[int], model: Path, data: Path, *, steps: int | None, progress: bool
) -> list[dict[str, Any]]:
    """Every method on every task and seed."""
    from anabranch.tune.rank_texts import TASKS, TextSettings, learn, read, variants

    s = TextSettings() if steps is None else TextSettings(steps=steps)
    texts = {task: read(data, task, model, s.tokens) for task in TASKS}
    jobs: list[Job] = [
        (
            {"task": task, "method": name, "seed": seed, "settings": asdict(s), "made": asdict(made)},
            partial(learn, s, model, texts[task], task, name, made, seed),
        )
        for seed in seeds
        for task in TASKS
        for name, made in variants(s).items()
    ]
    return run_jobs(runs / "texts", jobs, s.steps, progress=progress)


def run_jobs(folder: Path, jobs: Sequence[Job], steps: int, *, progress: bool) -> list[dict[str, Any]]:
    """Results of all jobs, from their files where those are of exactly this job."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with tqdm(total=len(jobs) * steps, unit="step", disable=not progress, mininterval=1.0) as bar:
        for job, do in jobs:
            words = [str(job[key]) for key in ("task", "method", "seed") if key in job]
            path = folder / f"{'-'.join(words).replace(', ', '-').replace(' ', '-')}.json"
            bar.set_postfix_str(" ".join(words))
            if path.is_file() and (saved := read_json(path))["job"] == job:
                bar.update(steps)
            else:
                saved = {"job": job, "result": asdict(do(bar.update))}
                write_json(path, saved)
            results.append(saved["result"])
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, then write tables, figures and the picture."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m anabranch.tune.rank_study", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of the results of single runs")
    add("--json", type=Path, required=True, help="figures go here")
    add("--report", type=Path, required=True, help="Markdown page whose tables are replaced")
    add("--plot", type=Path, help="PNG (needs matplotlib)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: both)")
    add("--model", type=Path, help="model folder for texts: a small Llama such as stories260k")
    add("--data", type=Path, help="folder that holds ag-news and banking77")
    add("--seeds", type=int, nargs="+", help="(default: 0 to 4 for teachers, 0 to 2 for texts)")
    add("--steps", type=int, help="of each run (default: 200 for teachers, 150 for texts)")
    add("--threads", type=int, default=1, help="threads torch computes with (default: %(default)s)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    args = parser.parse_args(argv)
    if "texts" in args.parts and (args.model is None or args.data is None):
        parser.error("texts need --model and --data; without them: --parts teachers")
    if args.steps is not None and args.steps < 20:
        parser.error(f"--steps must be at least 20, got {args.steps}")
    check_targets([path for path in (args.json, args.report, args.plot) if path])

    import torch

    from anabranch.common.threads import torch_threads
    from anabranch.tune import rank_figures

    results: dict[str, list[dict[str, Any]]] = {}
    options = {"steps": args.steps, "progress": args.progress}
    with torch_threads(args.threads):
        if "teachers" in args.parts:
            results["teachers"] = run_teachers(args.runs, args.seeds or SEEDS["teachers"], **options)
        if "texts" in args.parts:
            results["texts"] = run_texts(args.runs, args.seeds or SEEDS["texts"], args.model, args.data, **options)
    write_json(args.json, {"torch": torch.__version__, "threads": args.threads, **results})
    page = rank_figures.markdown(results)
    write_tables(args.report, page)
    if args.plot:
        rank_figures.draw(results, args.plot)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
