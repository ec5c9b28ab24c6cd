"""What does routing by rank buy? SMoRA, LoRA and mixtures of LoRA learn the same teachers from the same tokens.

    python -m anabranch.tune.smora_study --runs runs/smora-study --json study.json --report study.md --plot study.png

Every method gets the best of the same five learning rates, chosen on teachers that nothing else is measured on. Within
a seed all methods see the same teachers and tokens. Finished runs are skipped, so the command can be repeated until it
is done.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anabranch.common.checkpoint import read_json, write_json
from anabranch.common.interrupt import interruptible
from anabranch.tune.smora_door import VALIDATION, parse, publish, study_parser
from anabranch.tune.smora_figures import collect, markdown
from anabranch.tune.teacher_run import METHODS, TeacherRun, learn
from anabranch.tune.teachers import Suite

TABLES = "teachers"
SUITES = {"one distribution": Suite(own=0.0), "own distributions": Suite(own=0.9)}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BALANCES = {"smora": (0.0, 1e-5, 1e-4, 1e-3), "smora, softmax": (0.0, 1e-3)}
VARIED = ("lora-64", "experts 8x8, Switch", "blocks of 4", "blocks of 2", "smora")
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "code of length 4": {"code": 4.0},
    "code of length 16": {"code": 16.0},
    "nothing shared": {"shared": 0},
    "twice the steps": {"steps": 2},
    "twice the steps, a third of the rate": {"steps": 2, "slower": 3.0},
    "four times the steps": {"steps": 4},
}
SEEDS_VARIED = 3  # the first of them

Results = dict[TeacherRun, dict[str, Any]]


def tuning(steps: int) -> list[TeacherRun]:
    """Every method of every suite at every rate."""
    return [
        TeacherRun(suite=suite, method=method, seed=VALIDATION, lr=lr, steps=steps)
        for suite in SUITES.values()
        for method in METHODS
        for lr in RATES
    ]


def best_rates(results: Results) -> dict[tuple[Suite, str], float]:
    """The rate of each suite and method that left least to learn; the lower of equals."""
    best: dict[tuple[Suite, str], tuple[float, float]] = {}
    for run, found in results.items():
        if found["left"] is not None:
            key = run.suite, run.method
            best[key] = min(best.get(key, (float("inf"), 0.0)), (found["left"], run.lr))
    return {key: lr for key, (_, lr) in best.items()}


def compared(rates: Mapping[tuple[Suite, str], float], seeds: Sequence[int], steps: int) -> list[TeacherRun]:
    """Every method of every suite at its own rate; the comparisons of methods, blocks, gates and overlaps."""
    return [
        TeacherRun(suite=suite, method=method, seed=seed, lr=rates[suite, method], steps=steps)
        for seed in seeds
        for suite in SUITES.values()
        for method in METHODS
    ]


def balanced(runs: Iterable[TeacherRun]) -> list[TeacherRun]:
    """SMoRA with each step of its biases; its own is among those compared already."""
    own = {name: METHODS[name].settings.balance for name in BALANCES}
    return [
        replace(run, balance=None if u == own[run.method] else u) for run in runs for u in BALANCES.get(run.method, ())
    ]


def varied(runs: Iterable[TeacherRun], seeds: Sequence[int]) -> dict[str, list[TeacherRun]]:
    """The same under other conditions, one changed at a time, at the same rates."""
    base = [run for run in runs if run.method in VARIED and run.seed in seeds[:SEEDS_VARIED]]
    return {name: [_changed(run, **changes) for run in base] for name, changes in VARIATIONS.items()}


def _changed(run: TeacherRun, *, steps: int = 1, slower: float = 1.0, **suite: Any) -> TeacherRun:
    return replace(run, steps=steps * run.steps, lr=run.lr / slower, suite=replace(run.suite, **suite))


def run_all(runs: Sequence[TeacherRun], folder: Path, bar: "tqdm[Any]") -> Results | None:
    """Results of all, those not in the folder computed and left there; None when interrupted."""
    results: Results = {}
    with interruptible() as interrupted:
        for run in runs:
            if interrupted.is_set():
                return None
            recipe = run.recipe()
            path = folder / f"{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.json"
            if not path.is_file():
                write_json(path, {"recipe": recipe, "found": learn(run)})
            results[run] = read_json(path)["found"]
            bar.update()
    return results


def study(folder: Path, seeds: Sequence[int], steps: int, *, progress: bool = True) -> dict[str, Any] | None:
    """All runs and their figures; None when interrupted."""
    first = tuning(steps)
    with tqdm(total=len(first), unit="run", disable=not progress) as bar:
        tried = run_all(first, folder, bar)
        if tried is None:
            return None
        runs = compared(best_rates(tried), seeds, steps)
        others = varied(runs, seeds)
        every = dict.fromkeys([*runs, *balanced(runs), *(run for some in others.values() for run in some)])
        bar.total += len(every)
        done = run_all(list(every), folder, bar)
    if done is None:
        return None
    return collect(SUITES, tried, runs, balanced(runs), others, done)


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """What is left to learn, each seed a dot."""
    from anabranch.common.plot import draw_seeds

    panels = {
        suite: {row["method"]: row["left"] for row in figures["methods"] if row["suite"] == suite} for suite in SUITES
    }
    draw_seeds(path, panels, x="% of the targets left to learn (log)")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write the figures; 130 when interrupted."""
    args = parse(study_parser("anabranch.tune.smora_study", __doc__, tables=TABLES, seeds=range(5), steps=300), argv)

    from anabranch.common.threads import torch_threads

    with torch_threads(args.threads):
        figures = study(args.runs, args.seeds, args.steps, progress=args.progress)
    return publish(args, figures, page=markdown, tables=TABLES, draw=draw)


if __name__ == "__main__":
    raise SystemExit(main())
