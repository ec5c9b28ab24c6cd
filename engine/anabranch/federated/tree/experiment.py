"""Trees on the same samples: every variant sees the same leaves, labels, bridge samples and batches under a seed.

The bridge is fitted to public samples, the same in every run; what is left is dealt out to the leaves as to the clients
of any federation, so that the mean of models beside it learns from the same samples.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from anabranch.common.checkpoint import read_json, write_json, write_safetensors
from anabranch.common.threads import torch_threads
from anabranch.data.labelled import Labelled
from anabranch.federated import experiment, run_files
from anabranch.federated.choices import Chosen, choose_network
from anabranch.federated.evaluate import predict
from anabranch.federated.experiment import LAST, Course, fingerprint, generator, lay_out, slug
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.layout import Network
from anabranch.federated.noise_groups import parse_groups
from anabranch.federated.plan import Plan
from anabranch.federated.rounds import each
from anabranch.federated.tree import bridge
from anabranch.federated.tree.channel import Crossing
from anabranch.federated.tree.fedeec import Hierarchy, Round, found, run_round, stores
from anabranch.federated.tree.plan import FedEEC, TreePlan
from anabranch.federated.tree.rectify import Ring, parse_rule
from anabranch.federated.tree.topology import ROOT, Tree

AVERAGING = "averaging"
FIRST = 5  # rounds in which the leaves are weak


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeCourse:
    """How one tree learnt; numbers only, so that it can be written as JSON.

    heights  of each node
    sizes    numbers of the model of each height
    rounds   for each round: accuracy of each node, of each height the bytes that crossed up and down to its parents,
             predictions told and how many of them were wrong, and the leaves that moved
    before   bytes of embeddings and labels that went up from each height before the first round
    models   SHA-256 of all last models' bytes
    seconds  spent in rounds, evaluation not counted
    """

    variant: str
    noise: str
    seed: int
    heights: list[int]
    sizes: list[int]
    rounds: list[dict[str, Any]]
    before: list[int]
    models: str
    seconds: float

    def of_height(self, height: int, round: int) -> float:
        """Mean accuracy of the nodes of a height after a round."""
        accuracies = self.rounds[round]["accuracy"]
        return fmean(value for value, of in zip(accuracies, self.heights, strict=True) if of == height)

    def last(self, height: int) -> float:
        """The same, mean over the last ten rounds."""
        rounds = range(len(self.rounds))[-LAST:]
        return fmean(self.of_height(height, i) for i in rounds)

    def first(self, height: int) -> float:
        """And over the first five."""
        return fmean(self.of_height(height, i) for i in range(len(self.rounds))[:FIRST])


class TreeResults(NamedTuple):
    """courses: of all trees that were finished; averages: of the mean of models. interrupted: some were not."""

    plan: TreePlan
    data: Labelled
    courses: list[TreeCourse]
    averages: list[Course]
    interrupted: bool


def compare(plan: TreePlan, data: Labelled, *, interrupted: threading.Event, progress: bool = True) -> TreeResults:
    """Every variant under every noise and seed; with an `out`, what is finished is written and not done again."""
    public, private = set_apart(data, plan.public)
    variants = {name: (one, networks_of(one, private)) for name, one in plan.variants().items()}
    for one, _ in variants.values():
        parse_rule(one.rectify)
    for noise in plan.plan.noise:
        parse_groups(noise)  # says now what is wrong with the last of them
    seeds = range(plan.plan.schedule.seed, plan.plan.schedule.seed + plan.plan.seeds)
    digest = fingerprint(data)
    courses: list[TreeCourse] = []
    total = len(variants) * len(plan.plan.noise) * len(seeds) * plan.plan.schedule.rounds
    with torch_threads(1), tqdm(total=total, unit="round", disable=not progress, mininterval=0.5) as bar:
        for noise in plan.plan.noise:
            for seed in seeds:
                holdings = lay_out(plan.plan, private, noise, seed).holdings
                fitted: dict[str, bridge.Bridge] = {}
                for name, (settings, networks) in variants.items():
                    if settings.bridge not in fitted:
                        fitted[settings.bridge] = bridge.fit(settings.bridge, public, generator(seed, "bridge"))
                    schedule = replace(plan.plan.schedule, seed=seed)
                    h = found(settings, plan.topology(), networks, holdings, fitted[settings.bridge], schedule)
                    course = _Run(plan, name, private, h, noise, digest).go(bar, interrupted)
                    if course is None:
                        return TreeResults(plan, private, courses, [], True)
                    courses.append(course)
    if not plan.averaging:
        return TreeResults(plan, private, courses, [], False)
    averages = experiment.compare(
        averaged(plan), [Chosen(AVERAGING, FedAvg())], private, interrupted=interrupted, progress=progress
    )
    return TreeResults(plan, private, courses, averages.courses, averages.interrupted)


def set_apart(data: Labelled, share: float) -> tuple[Tensor, Labelled]:
    """Public samples [n, ...], always the same, and the task without them."""
    order = torch.randperm(len(data.y), generator=generator(0, "public"))
    public, rest = order[: max(1, int(share * len(order)))], order[max(1, int(share * len(order))) :].sort().values
    given = {name: y[rest] for name, y in data.given.items()}
    owners = None if data.owners is None else data.owners[rest]
    return data.x[public], replace(data, x=data.x[rest], y=data.y[rest], given=given, owners=owners)


def networks_of(settings: FedEEC, data: Labelled) -> list[Network]:
    """The networks of each height, leaves first."""
    return [choose_network(name, data, hidden) for name, hidden in map(named, settings.networks)]


def named(text: str) -> tuple[str, tuple[int, ...]]:
    """`mlp:64x32` as a network's name and the widths of its hidden layers; `mlp` has none."""
    name, given, widths = text.partition(":")
    try:
        hidden = tuple(int(width) for width in widths.split("x")) if given else ()
    except ValueError:
        hidden = (0,)
    if (given and name != "mlp") or 0 in hidden:
        raise ValueError(f"a network is written mlp, mlp:WIDTH, mlp:WIDTHxWIDTH or by its name alone, got {text!r}")
    return name, hidden


def averaged(plan: TreePlan) -> Plan:
    """The mean of all leaves' models, weighted by their samples, through the same tree: a mean of means is the same."""
    network, hidden = named(plan.settings.networks[0])
    return replace(plan.plan, network=network, hidden=hidden)


class _Run:
    """One tree: rounds with their evaluation, log and checkpoints."""

    def __init__(self, plan: TreePlan, name: str, data: Labelled, h: Hierarchy, noise: str, digest: str) -> None:
        self.plan, self.name, self.data, self.h, self.noise = plan, name, data, h, noise
        self.seed = h.schedule.seed
        self.before = by_height(h, h.channel.take())["up"]
        identity = {
            "settings": asdict(h.settings), "noise": noise, "seed": self.seed, "data": digest,
            "bridge samples": hashlib.sha256(h.bridged.numpy().data).hexdigest(), **plan.identity(),
        }  # fmt: skip
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read again
        out = plan.plan.out
        self.folder = out / slug(name) / slug(noise) / f"seed-{self.seed}" if out else None
        self.log: list[dict[str, Any]] = []
        self.threads = plan.plan.threads or len(os.sched_getaffinity(0))

    def go(self, bar: "tqdm[Any]", interrupted: threading.Event) -> TreeCourse | None:
        """The rounds that are left; None if somebody stops them."""
        rounds = self.plan.plan.schedule.rounds
        finished = self.prepare()
        bar.update(rounds if finished else self.h.round)
        if finished:
            return finished
        while self.h.round < rounds:
            if interrupted.is_set():
                return None
            self.step()
            accuracy = self.log[-1]["accuracy"][ROOT]
            bar.set_postfix_str(f"{self.name} {self.noise} seed {self.seed}: root {accuracy:.1%}", refresh=False)
            bar.update()
        return self.finish()

    def prepare(self) -> TreeCourse | None:
        """Go on with what the folder holds if that is wanted; the course if nothing is left to do."""
        if self.folder is None:
            return None
        held = run_files.enter(self.folder, resume=self.plan.plan.resume)
        if run_files.POINTER in held:
            tensors, self.h.round = run_files.get(self.folder, self.identity)
            from_tensors(tensors, self.h)
        if run_files.RESULT in held:
            return TreeCourse(**read_json(self.folder / run_files.RESULT))
        self.log = run_files.read_log(self.folder / run_files.LOG, self.h.round)
        return None

    def step(self) -> None:
        """One round, its evaluation, its line in the log, and then its checkpoint."""
        h, started = self.h, time.monotonic()
        done = run_round(h, threads=self.threads)
        seconds = time.monotonic() - started
        if not all(bool(model.isfinite().all()) for model in h.models):
            raise ValueError(
                f"{self.name}: models have numbers that are not finite after round {h.round}; try a smaller lr than "
                f"{h.schedule.lr}"
            )
        entry = self.entry(done, seconds)
        self.log.append(entry)
        if self.folder:
            run_files.append(self.folder / run_files.LOG, entry)
            run_files.put(self.folder, to_tensors(h), h.round, self.identity)

    def entry(self, done: Round, seconds: float) -> dict[str, Any]:
        """What is told of a round."""
        h, nodes = self.h, range(len(self.h.models))
        right = each(partial(accuracy, h, self.data.test_x, self.data.test_y), nodes, self.threads)
        return {
            "round": h.round - 1, "seconds": round(seconds, 4), "accuracy": [value for _, value in right],
            "bytes": by_height(h, h.channel.take()), "told": done.told, "wrong": done.wrong, "moved": done.moved,
        }  # fmt: skip

    def finish(self) -> TreeCourse:
        """The course, written beside the models."""
        h, digest = self.h, hashlib.sha256()
        for model in h.models:
            digest.update(model.contiguous().numpy().data)
        course = TreeCourse(
            variant=self.name, noise=self.noise, seed=self.seed, heights=h.tree.heights,
            sizes=[network.layout.size for network in h.networks], rounds=self.log, before=self.before,
            models=digest.hexdigest(), seconds=sum(entry["seconds"] for entry in self.log),
        )  # fmt: skip
        if self.folder:
            write_safetensors(self.folder / run_files.MODEL, {
                f"{v}.{name}": value[0].clone()
                for v, model in enumerate(h.models)
                for name, value in h.networks[h.tree.heights[v]].layout.views(model[None]).items()
            })  # fmt: skip
            write_json(self.folder / run_files.RESULT, asdict(course))
        return course


def accuracy(h: Hierarchy, x: Tensor, y: Tensor, node: int) -> float:
    """Share of samples that a node names rightly."""
    logits = predict(h.networks[h.tree.heights[node]], h.models[node], x)
    return float((logits.argmax(1) == y).double().mean())


def by_height(h: Hierarchy, crossed: Mapping[Crossing, int]) -> dict[str, list[int]]:
    """Bytes of the links from the nodes of each height to their parents: predictions up and down, samples up."""
    sums = {"up": [0] * len(h.networks[:-1]), "down": [0] * len(h.networks[:-1])}
    for crossing, count in crossed.items():
        sums["up" if crossing.up else "down"][h.tree.heights[crossing.child]] += count
    return sums


def to_tensors(h: Hierarchy) -> dict[str, Tensor]:
    """All that changes from round to round."""
    tensors = {f"model.{v}": model.clone() for v, model in enumerate(h.models)}
    tensors["ring.values"] = torch.stack([ring.values for ring in h.rings])
    tensors["ring.counts"] = torch.stack([ring.counts for ring in h.rings])
    tensors["parents"] = torch.tensor(h.tree.parents)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], h: Hierarchy) -> None:
    """The other way round."""
    h.models = [tensors[f"model.{v}"] for v in range(len(h.models))]
    rings = zip(tensors["ring.values"], tensors["ring.counts"], strict=True)
    h.rings = [Ring(values.clone(), counts.clone()) for values, counts in rings]
    h.tree = Tree(parents=tuple(tensors["parents"].tolist()))
    h.stores = stores(h.tree, h.holdings.owned)
