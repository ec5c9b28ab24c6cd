"""The methods on text: a small language model learns news, bank, maths and plays with LoRA, experts and SMoRA.

    python -m anabranch.tune.smora_text_study MODEL --data DIR --runs runs/smora-texts --json study.json

The runs are those of `anabranch tune`. Every method gets the best of the same rates, chosen on a seed and on held-out
examples that nothing else is measured on. Finished runs are skipped and an unfinished one goes on, so the command can
be repeated until it is done. DIR holds the data sets that anabranch/tune/texts.py names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anabranch.common import run_state
from anabranch.common.checkpoint import read_json
from anabranch.common.paired import paired, spread
from anabranch.tune.settings import TuneSettings
from anabranch.tune.smora_door import VALIDATION, parse, publish, study_parser
from anabranch.tune.smora_figures import interval, table, verdict
from anabranch.tune.texts import write_texts

TABLES = "texts"
REPORT = "tuning.json"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TARGETS = ("gate_proj", "up_proj", "down_proj")

# As in the study of teachers, a rank in use has the same scale everywhere: 2.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora-8": {"method": "lora", "rank": 8, "alpha": 16.0},
    "lora-64": {"method": "lora", "rank": 64, "alpha": 128.0},
    "experts 8x8": {"method": "experts", "rank": 64, "block": 8, "chosen": 1, "alpha": 2.0},
    "experts 16x4": {"method": "experts", "rank": 64, "block": 4, "chosen": 2, "alpha": 4.0},
    "smora": {"method": "smora", "rank": 64, "chosen": 8, "alpha": 16.0},
}


def base_settings(model: Path, runs: Path, steps: int) -> TuneSettings:
    """What all runs share."""
    return TuneSettings(
        model=model, data=(runs / "train.jsonl",), out=runs, targets=TARGETS, dtype="float32", context=128,
        batch=4, steps=steps, evaluate_every=steps, progress=False,
    )  # fmt: skip


def run_of(base: TuneSettings, method: str, seed: int, lr: float) -> TuneSettings:
    """One run; those of VALIDATION are measured on other examples than the rest."""
    part = "validation" if seed == VALIDATION else "test"
    name = f"{base.steps}-steps/{method.replace(' ', '-')}-lr{lr:g}-seed{seed}"
    held_out = base.out / f"{part}.jsonl"
    return replace(base, out=base.out / name, held_out=held_out, seed=seed, lr=lr, **METHODS[method])


def loss_of(settings: TuneSettings) -> float | None:
    """Held-out loss of a run, trained if it is not yet; None when interrupted."""
    from anabranch.tune.job import tune

    assert settings.steps is not None
    path = settings.out / REPORT
    if not path.is_file() or read_json(path)["recipe"] != settings.recipe(settings.steps):
        outcome = tune(replace(settings, resume=run_state.exists(settings.out)))
        if outcome.interrupted:
            return None
    return float(read_json(path)["held_out_loss"])


def study(base: TuneSettings, seeds: Sequence[int], *, progress: bool = True) -> dict[str, Any] | None:
    """All runs and their figures; None when interrupted."""
    rows = []
    with tqdm(total=len(METHODS) * (len(RATES) + len(seeds)), unit="run", disable=not progress) as bar:

        def losses(runs: Sequence[TuneSettings]) -> list[float] | None:
            found = []
            for run in runs:
                loss = loss_of(run)
                if loss is None:
                    return None
                found.append(loss)
                bar.update()
            return found

        for method in METHODS:
            tried = losses([run_of(base, method, VALIDATION, lr) for lr in RATES])
            if tried is None:
                return None
            lr = min(zip(tried, RATES, strict=True))[1]
            runs = [run_of(base, method, seed, lr) for seed in seeds]
            loss = losses(runs)
            if loss is None:
                return None
            parameters = read_json(runs[0].out / REPORT)["parameters"]
            row = {"method": method, "lr": lr, "tried": dict(zip(map(str, RATES), tried, strict=True))}
            rows.append({**row, "parameters": parameters, "loss": loss, **spread(loss)})
    smora = next(row for row in rows if row["method"] == "smora")["loss"]
    return {
        "model": base.model.name,
        "seeds": list(seeds),
        "untuned": untuned(base),
        "recipe": {name: getattr(base, name) for name in ("targets", "steps", "batch", "context", "gate", "balance")},
        "methods": rows,
        "paired": [
            {
                "pair": ["smora", row["method"]],
                **paired([x - y for x, y in zip(smora, row["loss"], strict=True)]),
            }
            for row in rows
            if row["method"] != "smora"
        ],
    }


def untuned(base: TuneSettings) -> float:
    """Loss of the model as it is, on what the runs are measured on."""
    from anabranch.data.instructions import read_examples
    from anabranch.data.packing import Packs
    from anabranch.data.tokenizer import load_tokenizer
    from anabranch.models.weights import load_model
    from anabranch.tune.job import mean_loss

    examples = list(read_examples([base.out / "test.jsonl"], load_tokenizer(base.model)))
    packs = Packs(examples, context=base.context, batch=base.batch, seed=0)
    return round(mean_loss(load_model(base.model, dtype=None, device="cpu"), packs), 5)


def markdown(figures: Mapping[str, Any]) -> str:
    """The tables of a study."""
    recipe, seeds = figures["recipe"], len(figures["seeds"])
    methods = [
        [row["method"], f"{row['parameters']:,}", f"{row['lr']:g}", f"{row['mean']:.4f}", _or_dash(row["sd"])]
        for row in figures["methods"]
    ]
    pairs = [
        [" minus ".join(row["pair"]), f"{row['mean']:+.4f}", interval(row, "+.4f"), verdict(row)]
        for row in figures["paired"]
    ]
    return (
        f"Held-out nats per token of {figures['model']}; means of {seeds} seeds after {recipe['steps']} steps of "
        f"{recipe['batch']} rows of {recipe['context']} tokens. Before: {figures['untuned']:.4f}.\n\n"
        + table(("", "parameters", "rate", "loss", "sd"), methods)
        + "\n\nDifferences within seeds, and Student's 95 % intervals:\n\n"
        + table(("", "mean", "95 % interval", "smora is"), pairs)
        + "\n"
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """The losses, each seed a dot."""
    from anabranch.common.plot import draw_seeds

    losses = {row["method"]: row["loss"] for row in figures["methods"]}
    draw_seeds(path, {figures["model"]: losses}, x="held-out nats per token", log=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write the figures; 130 when interrupted."""
    parser = study_parser("anabranch.tune.smora_text_study", __doc__, tables=TABLES, seeds=range(3), steps=120)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the data sets")
    args = parse(parser, argv)
    try:
        write_texts(args.data, args.runs)
    except ValueError as error:
        parser.error(str(error))

    from anabranch.common.threads import torch_threads

    with torch_threads(args.threads):
        figures = study(base_settings(args.model, args.runs, args.steps), args.seeds, progress=args.progress)
    return publish(args, figures, page=markdown, tables=TABLES, draw=draw)


if __name__ == "__main__":
    raise SystemExit(main())
