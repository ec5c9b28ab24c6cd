"""Does a transition matrix of each sample help where labels depend on the sample, and does it find out on what?

    python -m anabranch.federated.transition_study --json figures.json --report page.md

scikit-learn's digits with labels that are wrong by the sample, symmetrically or not at all, learned by one client or by
ten; and samples of two parts (labels/noise.py), of which it is known which features the labels depend on. Methods of a
seed see the same data, labels, first weights and batches.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from anabranch.common.checkpoint import write_json
from anabranch.common.files import check_targets
from anabranch.common.page import write_tables
from anabranch.common.paired import paired
from anabranch.data.labelled import Labelled
from anabranch.data.sources import load, parse_source
from anabranch.federated.choices import choose_method
from anabranch.federated.evaluate import predict
from anabranch.federated.experiment import generator, lay_out
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.causal_transition import CausalTransition
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.separated import Separated
from anabranch.federated.plan import Plan
from anabranch.federated.rounds import Federation, Holdings, found, run_round
from anabranch.federated.schedule import Schedule
from anabranch.labels.noise import counted_matrix, two_parts
from anabranch.labels.transition import label_column, posterior

DIGITS = Schedule(rounds=40, epochs=1, batch=64)
MANY_CLIENTS = Schedule(rounds=25, epochs=5, batch=16)
PARTED = Schedule(rounds=60, epochs=1, batch=64, lr=0.01)
SEEDS = (0, 1, 2, 3, 4, 5)
LAST = 5  # rounds whose mean accuracy counts
RESISTANT, SENSITIVE, LEARNED, TESTED, CLASSES = 10, 10, 4000, 2000, 5
OURS = "causal-transition:forget=0.4"
TWO_PARTS = "two parts"


class Task(NamedTuple):
    """Samples and who owns them, the right classes, and others to test on."""

    holdings: Holdings
    clean: Tensor
    test_x: Tensor
    test_y: Tensor


# What is learned from, by how many clients, and by which methods: name here -> name of the command line.
SETTINGS: Mapping[tuple[str, int], Mapping[str, str]] = {
    ("clean", 1): {"CE": "fedavg", "ours": "causal-transition:forget=0"},
    ("symmetric:0.4", 1): {"CE": "fedavg", "forward": "forward-correction:matrix=symmetric:0.4", "ours": OURS},
    ("instance:0.4", 1): {
        "CE": "fedavg",
        "forward": "forward-correction:matrix=symmetric:0.4",
        "forward, anchors": "forward-correction",
        "co-teaching": "co-teaching:forget=0.4,ramp=10",
        "ours": OURS,
        "straight-through": f"{OURS},estimator=straight-through",
        "without L_T": f"{OURS},anchor=0",
        "without L_dec": f"{OURS},decorrelation=0",
    },
    ("instance:0.4@half,pairflip:0.3@half", 10): {
        "CE": "fedavg", "co-teaching": "co-teaching:forget=0.35,ramp=10",
        "ours": "causal-transition:forget=0.35", "shared heads": "causal-transition:forget=0.35,local=false",
    },
    (TWO_PARTS, 1): {
        "CE": "fedavg",
        "ours": "causal-transition:forget=0.5,factors=20,kappa=1,policy=0.2,entropy=0.002",
        "default weights": "causal-transition:forget=0.5,factors=20",
    },
}  # fmt: skip


def digits_task(data: Labelled, noise: str, clients: int, seed: int) -> Task:
    laid = lay_out(Plan(clients=clients), data, noise, seed)
    return Task(laid.holdings, laid.clean, data.test_x, data.test_y)


def two_parts_task(seed: int) -> Task:
    made = two_parts(
        LEARNED + TESTED, CLASSES, generator(seed, TWO_PARTS),
        resistant=RESISTANT, sensitive=SENSITIVE, shift=0.3, strength=5.0,
    )  # fmt: skip
    mine = torch.arange(LEARNED)
    return Task(Holdings(made.x, made.y, [mine]), made.clean, made.x[LEARNED:], made.clean[LEARNED:])


def learn(method: FedAvg, network: MLP, task: Task, schedule: Schedule) -> dict[str, float | None]:
    """Accuracy of the first network, or of the vote, over the last rounds; and what `known` finds."""
    f, accuracies = found(method, network, task.holdings, schedule), []
    while f.round < schedule.rounds:
        run_round(f)
        if f.round > schedule.rounds - LAST:
            each = torch.stack([predict(f.network, row, task.test_x) for row in f.server["model"]])
            accuracies.append(float((method.vote(each)[0].argmax(1) == task.test_y).double().mean()))
    return {"accuracy": fmean(accuracies), **(known(f, method, task) if isinstance(method, CausalTransition) else {})}


@torch.no_grad()
def known(f: Federation, method: CausalTransition, task: Task) -> dict[str, float | None]:
    """What a model says of its samples, against the truth.

    diagonal  mean T_ii of the clients · apart  mean |T - true T| over pairs of classes
    wrong     AUC of "the label is wrong", with score 1 - P(class = label | label, x) by the mean of both networks
    parts     AUC of x2's columns by their mean pi, for samples of two parts
    """
    network, (x, y, owned) = f.network, task.holdings
    assert isinstance(network, Separated)
    mine = torch.cat(list(owned))
    x, y, clean = x[mine], y[mine], task.clean[mine]
    views, labels = network.layout.views(f.server["model"]), y.expand(2, -1)
    latent, _ = network.encode(views, x.expand(2, *x.shape), training=False)
    h = network.decode(views, latent, training=False)[1]
    s = network.separate(views, h)
    parts = network.parts(views, h, (s > 0).float())
    right = posterior(parts.logits.softmax(-1), label_column(parts.transition, labels, method.eps))
    right = right.gather(-1, labels[..., None]).squeeze(-1).mean(0)
    true = counted_matrix(clean, y, network.classes)
    told: dict[str, float | None] = {
        "diagonal": float(f.server["diagonal"].mean()),
        "apart": float((f.server["transition"] - true).abs().mean()),
        "wrong": area(1 - right, y != clean),
    }
    if x.shape[1:] == (RESISTANT + SENSITIVE,):
        told["parts"] = area(s.sigmoid().mean((0, 1)), torch.arange(RESISTANT + SENSITIVE) >= RESISTANT)
    return told


def area(score: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve; None where all are positive or none is."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), score.numpy())) if len(positive.unique()) == 2 else None


def run(seeds: Sequence[int], *, progress: bool) -> list[dict[str, Any]]:
    """Every method in every setting on every seed."""
    data = load(parse_source("digits", None), picture_size=None)
    results = []
    total = len(seeds) * sum(map(len, SETTINGS.values()))
    with tqdm(total=total, unit="run", disable=not progress) as bar:
        for seed in seeds:
            for (noise, clients), methods in SETTINGS.items():
                is_two = noise == TWO_PARTS
                task = two_parts_task(seed) if is_two else digits_task(data, noise, clients, seed)
                network = MLP((RESISTANT + SENSITIVE, CLASSES) if is_two else (64, 64, data.classes))
                schedule = PARTED if is_two else MANY_CLIENTS if clients > 1 else DIGITS
                for name, text in methods.items():
                    figures = learn(choose_method(text).method, network, task, replace(schedule, seed=seed))
                    results.append({"noise": noise, "clients": clients, "method": name, "seed": seed, **figures})
                    bar.update()
    return results


class Check(NamedTuple):
    """What was expected: that figures of a method, less those of another if there is one, are above `least`."""

    says: str
    noise: str
    figure: str
    least: float
    other: str | None = None


CHECKS = (
    Check("instance: at least 3 points above CE", "instance:0.4", "accuracy", 0.03, "CE"),
    Check("instance: not below forward by the rate", "instance:0.4", "accuracy", 0.0, "forward"),
    Check("instance: not below forward by anchors", "instance:0.4", "accuracy", 0.0, "forward, anchors"),
    Check("symmetric: at most 1 point below forward, which knows T", "symmetric:0.4", "accuracy", -0.01, "forward"),
    Check("clean: at most half a point below CE", "clean", "accuracy", -0.005, "CE"),
    Check("clean: mean diagonal of T above 0.95", "clean", "diagonal", 0.95),
    Check("instance: AUC of wrong labels above 0.85", "instance:0.4", "wrong", 0.85),
    Check("symmetric: AUC of wrong labels above 0.85", "symmetric:0.4", "wrong", 0.85),
    Check("two parts: AUC of x2's columns above 0.9", TWO_PARTS, "parts", 0.9),
)


def of(results: Sequence[Mapping[str, Any]], noise: str, method: str, figure: str) -> list[float]:
    """A figure, seed by seed."""
    return [one[figure] for one in results if (one["noise"], one["method"]) == (noise, method)]


def checked(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each check the mean, half of its 95 % interval, and whether it holds: all, part or nothing of the interval."""
    told = []
    for check in CHECKS:
        values = of(results, check.noise, "ours", check.figure)
        if check.other:
            values = [a - b for a, b in zip(values, of(results, check.noise, check.other, check.figure), strict=True)]
        found = paired(values)
        mean, half = found["mean"], found["half_width_95"] or 0.0
        holds = "yes" if mean - half >= check.least else "no" if mean < check.least else "in the mean"
        told.append({**check._asdict(), "mean": mean, "half": found["half_width_95"], "holds": holds})
    return told


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """All tables."""
    seeds = len({one["seed"] for one in results})
    lines = [
        f"Means over {seeds} seeds with 95 % intervals; accuracies in %, and beside them the difference from CE within "
        "seeds.",
        "",
        "| labels | clients | method | accuracy | from CE | mean T_ii | error of T by class | AUC of wrong labels |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (noise, clients), methods in SETTINGS.items():
        base = of(results, noise, "CE", "accuracy")
        for name in methods:
            accuracies = of(results, noise, name, "accuracy")
            apart = [a - b for a, b in zip(accuracies, base, strict=True)]
            cells = [shown(accuracies, 100, 1), "" if name == "CE" else shown(apart, 100, 1, "+")]
            for figure in ("diagonal", "apart", "wrong"):
                values = [one.get(figure) for one in results if (one["noise"], one["method"]) == (noise, name)]
                there = [value for value in values if value is not None]
                cells.append(shown(there, 1, 3) if there else "–")
            lines.append(f"| {noise} | {clients} | {name} | {' | '.join(cells)} |")
    lines += ["", "| labels | ours less | points of accuracy within seeds |", "|---|---|---:|"]
    for (noise, _), methods in SETTINGS.items():
        ours = of(results, noise, "ours", "accuracy")
        for name in methods:
            if name not in ("CE", "ours"):
                apart = [a - b for a, b in zip(ours, of(results, noise, name, "accuracy"), strict=True)]
                lines.append(f"| {noise} | {name} | {shown(apart, 100, 1, '+')} |")
    lines += ["", "| expected | measured | holds |", "|---|---:|---|"]
    for one in checked(results):
        half = "" if one["half"] is None else f" ± {one['half']:.3f}"
        lines.append(f"| {one['says']} | {one['mean']:.3f}{half} | {one['holds']} |")
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float], times: float, digits: int, sign: str = "") -> str:
    found = paired([times * value for value in values])
    half = found["half_width_95"]
    return f"{found['mean']:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, then write figures and tables."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m anabranch.federated.transition_study", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--json", type=Path, required=True, help="figures go here")
    add("--report", type=Path, required=True, help="Markdown page whose tables are replaced")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="(default: 0 to 5)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    args = parser.parse_args(argv)
    check_targets([args.json, args.report])
    results = run(args.seeds, progress=args.progress)
    write_json(args.json, {"torch": torch.__version__, "runs": results, "checks": checked(results)})
    page = markdown(results)
    write_tables(args.report, page)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
