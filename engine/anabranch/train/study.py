"""Do fewer key heads hurt less than fewer value heads? Five small models of each kind on the same batches.

    python -m anabranch.train.study --runs runs/diffqkv-study --json study.json --report study.md

Every variant of a seed starts from the same generator, sees the same batches and follows the same schedule; only the
numbers of K and V heads differ. Finished runs are skipped and an unfinished one goes on, so the command can be
repeated until it is done.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.common.checkpoint import read_json, write_json
from anabranch.common.page import write_tables
from anabranch.common.paired import paired, spread
from anabranch.train.settings import LMSettings

INTERRUPTED = 130  # 128 + SIGINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Head counts of one kind of model."""

    name: str
    q_heads: int
    k_heads: int
    v_heads: int


VARIANTS = (
    Variant(name="fewer-k", q_heads=8, k_heads=2, v_heads=8),
    Variant(name="equal", q_heads=8, k_heads=8, v_heads=8),
    Variant(name="fewer-v", q_heads=8, k_heads=8, v_heads=2),
)
PAIRS = (("fewer-k", "equal"), ("fewer-v", "equal"), ("fewer-v", "fewer-k"))


def settings_for(variant: Variant, seed: int, runs: Path, *, steps: int) -> LMSettings:
    """The run of one variant and seed: no augmented query, so that nothing but the head counts differs."""
    return LMSettings(
        out=runs / f"{steps}-steps" / f"{variant.name}-seed{seed}",
        held_out=0.02,
        hidden_size=128,
        ffn_size=256,
        layers=2,
        q_heads=variant.q_heads,
        k_heads=variant.k_heads,
        v_heads=variant.v_heads,
        head_dim=16,
        q_intermediate_size=None,
        augq_residual=False,
        context=256,
        batch=2,
        steps=steps,
        warmup=max(1, steps // 20),
        lr=2e-3,
        beta2=0.99,
        evaluate_every=max(1, steps // 4),
        evaluate_windows=64,
        seed=seed,
        weights="float32",
    )


def run_all(runs: Path, seeds: Sequence[int], steps: int) -> bool:
    """Train what is not trained yet, seed by seed; False when a run was interrupted."""
    from anabranch.common import run_state
    from anabranch.train.lm import train

    for seed in seeds:
        for variant in VARIANTS:
            settings = settings_for(variant, seed, runs, steps=steps)
            if finished(settings):
                continue
            print(f"{variant.name}, seed {seed}, {steps} steps", flush=True)
            if train(replace(settings, resume=run_state.exists(settings.out))).stopped is not None:
                return False
    return True


def finished(settings: LMSettings) -> bool:
    """Whether the folder of a run holds the report of exactly this run, all steps done."""
    path = settings.out / "training.json"
    if not path.is_file():
        return False
    report = read_json(path)
    return report["recipe"] == settings.recipe() and report["stopped"] is None


def collect(runs: Path, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Figures of the seeds that all variants finished: per run, per variant, and paired by seed."""
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    for variant in VARIANTS:
        for seed in seeds:
            settings = settings_for(variant, seed, runs, steps=steps)
            if finished(settings):
                reports[variant.name, seed] = read_json(settings.out / "training.json")
    whole = [seed for seed in seeds if all((variant.name, seed) in reports for variant in VARIANTS)]
    if not whole:
        raise ValueError(f"no seed of {list(seeds)} has all of {[v.name for v in VARIANTS]} finished in {runs}")
    used = [reports[variant.name, seed] for variant in VARIANTS for seed in whole]
    if len({report["corpus"]["sha256"] for report in used}) > 1:
        raise ValueError(f"the runs in {runs} were trained on different texts")
    bits = {v.name: [reports[v.name, seed]["held_out_bits_per_byte"] for seed in whole] for v in VARIANTS}
    recipe = {key: x for key, x in used[0]["recipe"].items() if key not in ("seed", "k_heads", "v_heads")}
    return {
        "seeds": whole,
        "tokens_per_run": used[0]["tokens"],
        "corpus": used[0]["corpus"],
        "python": used[0]["python"],
        "torch": used[0]["torch"],
        "recipe": recipe,
        "variants": [
            {
                "name": variant.name,
                "heads": [variant.q_heads, variant.k_heads, variant.v_heads],
                "parameters": reports[variant.name, whole[0]]["parameters"],
                "cached_numbers_per_token": (variant.k_heads + variant.v_heads) * recipe["head_dim"] * recipe["layers"],
                "bits_per_byte": bits[variant.name],
                "seconds": [reports[variant.name, seed]["seconds"] for seed in whole],
                **spread(bits[variant.name]),
            }
            for variant in VARIANTS
        ],
        "paired": [
            {"pair": [a, b], **paired([x - y for x, y in zip(bits[a], bits[b], strict=True)])} for a, b in PAIRS
        ],
    }


def markdown(figures: dict[str, Any]) -> str:
    """The tables of a study and what its noise lets one say."""
    seeds, tokens = figures["seeds"], figures["tokens_per_run"]
    by_seed = " | ".join(f"seed {seed}" for seed in seeds)
    rule = "---|" * (len(seeds) + 2)
    lines = [f"Each run took {figures['recipe']['steps']} steps over {tokens / 1e6:.2f} million bytes.", ""]
    lines += [f"| | heads q/k/v | parameters | cached per token | {by_seed} | mean | sd |", f"|---|---|---|---|{rule}"]
    for v in figures["variants"]:
        cells = [v["name"], "/".join(map(str, v["heads"])), str(v["parameters"]), str(v["cached_numbers_per_token"])]
        cells += [f"{x:.4f}" for x in v["bits_per_byte"]] + [f"{v['mean']:.4f}", _or_dash(v["sd"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Differences between runs of the same seed, in bits per byte:", ""]
    lines += [f"| | {by_seed} | mean | 95 % interval |", f"|---|{rule}"]
    for p in figures["paired"]:
        half = p["half_width_95"]
        interval = "–" if half is None else f"{p['mean'] - half:+.4f} to {p['mean'] + half:+.4f}"
        cells = [" minus ".join(p["pair"]), *(f"{x:+.4f}" for x in p["differences"]), f"{p['mean']:+.4f}", interval]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {reading(p)}" for p in figures["paired"])]) + "\n"


def reading(pair: dict[str, Any]) -> str:
    """One sentence on a paired difference: its sign if the interval excludes zero, otherwise that it cannot tell."""
    (a, b), half = pair["pair"], pair["half_width_95"]
    if half is None or abs(pair["mean"]) <= half:
        return f"**{a}** and **{b}** cannot be told apart by these seeds: the 95 % interval includes zero."
    word = "worse" if pair["mean"] > 0 else "better"
    return f"**{a}** is {word} than **{b}** by {abs(pair['mean']):.4f} bits per byte (95 % interval ± {half:.4f})."


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write the figures; 130 when a run was interrupted."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m anabranch.train.study",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", type=Path, required=True, help="figures go here")
    parser.add_argument("--report", type=Path, required=True, help="Markdown page whose tables are replaced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--steps", type=int, default=1400, help="steps of each run (default: 1400)")
    parser.add_argument("--threads", type=int, default=1, help="threads torch computes with (default: 1)")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(args.threads)
    if not run_all(args.runs, args.seeds, args.steps):
        print("stopped; the same command goes on")
        return INTERRUPTED
    figures = collect(args.runs, args.seeds, args.steps)
    write_json(args.json, figures)
    write_tables(args.report, markdown(figures))
    print(markdown(figures))
    return 0


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
