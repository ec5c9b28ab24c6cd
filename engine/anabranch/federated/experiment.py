"""Methods on the same federations: every method sees the same clients, labels, batches and first weights under a seed.

So differences between methods are paired by seed. A seed decides the partition, the noise, the first weights, the
cohorts and the batches, each by numbers of their own; the test is the same under all.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from anabranch.common.checkpoint import read_json, write_json
from anabranch.data.labelled import Labelled
from anabranch.federated import evaluate, run_files
from anabranch.federated.choices import Chosen, choose_network
from anabranch.federated.label_repair import repair
from anabranch.federated.networks.layout import Network
from anabranch.federated.noise_groups import make_noisy, parse_groups
from anabranch.federated.partition import deal_out, parse_partition
from anabranch.federated.plan import Plan
from anabranch.federated.rounds import Federation, Holdings, found, run_round
from anabranch.labels.noise import counted_matrix

if TYPE_CHECKING:
    from anabranch.federated.private import SecureSums

LAST = 10  # rounds whose mean accuracy is the result, as in FNBench
MOST_LISTED = 1000  # clients whose numbers are written down one by one


class Laid(NamedTuple):
    """What clients have under one noise and seed.

    clean  [M] int64     the right labels
    rates  [K] float64   share of wrong labels of each client
    """

    holdings: Holdings
    clean: Tensor
    rates: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How one run went; numbers only, so that it can be written as JSON.

    rounds      for each round the scores of each network, or vote; none where it was not looked at
    confusion   [W, C, C] counts on the test after the last round: class, named
    transition  [C, C] shares of the clients' labels: right, given
    rates       [K] share of wrong labels of each client
    by_client   what the server knows in the end of each client, one number each: name -> [K]
    by_class    and of each pair of classes: name -> [C, C]
    spectrum    [W, d] singular values of the covariance of what the last layer reads of the test
    found       F1 of the clients called noisy (label_repair.py)
    labels      shares of right labels given and learned
    model       SHA-256 of the last model's bytes
    clipped     numbers of all updates that secure sums clipped
    seconds     spent in rounds, evaluation not counted
    """

    method: str
    noise: str
    seed: int
    rounds: list[list[dict[str, float]]]
    confusion: list[list[list[int]]]
    transition: list[list[float]]
    rates: list[float]
    by_client: dict[str, list[float]] = field(default_factory=dict)
    by_class: dict[str, list[list[float]]] = field(default_factory=dict)
    spectrum: list[list[float]] = field(default_factory=list)
    found: float | None = None
    labels: list[float] | None = None
    model: str = ""
    clipped: int = 0
    seconds: float = 0.0

    def last(self, measure: str = "accuracy", network: int = 0) -> float:
        """Mean over those of the last ten rounds that were evaluated."""
        values = [scores[network][measure] for scores in self.rounds[-LAST:] if scores]
        return sum(values) / len(values)

    def best(self, measure: str = "accuracy", network: int = 0) -> float:
        """Of all rounds that were evaluated: what stopping in time would have given."""
        return max(scores[network][measure] for scores in self.rounds if scores)


class Results(NamedTuple):
    """courses: of all runs that were finished. interrupted: some were not."""

    plan: Plan
    data: Labelled
    courses: list[Course]
    interrupted: bool


def compare(
    plan: Plan, methods: Sequence[Chosen], data: Labelled, *, interrupted: threading.Event, progress: bool
) -> Results:
    """Every method under every noise and seed; with `plan.out`, what is finished is written and not done again."""
    network = choose_network(plan.network, data, plan.hidden)
    for noise in plan.noise:
        parse_groups(noise)  # says now what is wrong with the last of them
    for chosen in methods:
        secure_sums(plan, chosen)
    total = len(methods) * len(plan.noise) * plan.seeds * plan.schedule.rounds
    digest = fingerprint(data)
    courses: list[Course] = []
    with tqdm(total=total, unit="round", disable=not progress, mininterval=0.5) as bar:
        for noise in plan.noise:
            for seed in range(plan.schedule.seed, plan.schedule.seed + plan.seeds):
                laid = lay_out(plan, data, noise, seed)
                for chosen in methods:
                    run = _Run(plan, chosen, data, network, laid, noise, seed, digest)
                    course = run.go(bar, interrupted)
                    if course is None:
                        return Results(plan, data, courses, True)
                    courses.append(course)
    return Results(plan, data, courses, False)


def lay_out(plan: Plan, data: Labelled, noise: str, seed: int) -> Laid:
    """Deal the samples out and spoil labels."""
    partition, groups = parse_partition(plan.partition, minimum=plan.minimum), parse_groups(noise)
    owned = deal_out(partition, data.y, plan.clients, generator(seed, "partition"), owners=data.owners)
    if partition.kind == "resample":
        if any(group.kind != "clean" for group in groups):
            raise ValueError(
                "labels are spoiled client by client, but under resample clients share samples; take clean"
            )
        return Laid(Holdings(data.x, data.y, owned), data.y, torch.zeros(len(owned), dtype=torch.float64))
    noisy = make_noisy(groups, data, owned, generator(seed, "noise"))
    return Laid(Holdings(data.x, noisy.y, owned), data.y, noisy.rates)


def secure_sums(plan: Plan, chosen: Chosen) -> "SecureSums | None":
    """For one run of a method, if the plan asks for them. ValueError names what cannot be carried, and why."""
    if plan.secure is None:
        return None
    from anabranch.federated.private import SecureSums, sum_settings

    return SecureSums(sum_settings(plan.secure), chosen.method, plan.schedule.cohort_size(plan.clients))


def generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of a seed for one purpose."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fingerprint(data: Labelled) -> str:
    """SHA-256 of all that a run reads of its data."""
    digest = hashlib.sha256()
    for tensor in (data.x, data.y, data.test_x, data.test_y, *data.given.values()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Run:
    """One method, noise and seed: rounds with their evaluation, log and checkpoints."""

    def __init__(
        self,
        plan: Plan,
        chosen: Chosen,
        data: Labelled,
        network: Network,
        laid: Laid,
        noise: str,
        seed: int,
        digest: str,
    ) -> None:
        self.plan, self.chosen, self.data, self.laid = plan, chosen, data, laid
        self.noise, self.seed = noise, seed
        schedule = replace(plan.schedule, seed=seed)
        self.federation: Federation = found(chosen.method, network, laid.holdings, schedule)
        self.federation.sums = secure_sums(plan, chosen)
        identity = {
            "method": {"class": type(chosen.method).__name__, **asdict(chosen.method)},
            "noise": noise, "seed": seed, "data": digest, **plan.identity(),
        }  # fmt: skip
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read again
        self.folder = plan.out / slug(chosen.name) / slug(noise) / f"seed-{seed}" if plan.out else None
        self.log: list[dict[str, Any]] = []
        self.threads = plan.threads or len(os.sched_getaffinity(0))

    def go(self, bar: "tqdm[Any]", interrupted: threading.Event) -> Course | None:
        """The rounds that are left; None if somebody stops them."""
        rounds = self.plan.schedule.rounds
        finished = self.prepare()
        bar.update(rounds if finished else self.federation.round)
        if finished:
            return finished
        while self.federation.round < rounds:
            if interrupted.is_set():
                return None
            self.step()
            if self.log[-1]["networks"]:
                accuracy = self.log[-1]["networks"][0]["accuracy"]
                bar.set_postfix_str(f"{self.chosen.name} {self.noise} seed {self.seed}: {accuracy:.1%}", refresh=False)
            bar.update()
        return self.finish()

    def prepare(self) -> Course | None:
        """Go on with what the folder holds if that is wanted; the course if nothing is left to do."""
        if self.folder is None:
            return None
        held = run_files.enter(self.folder, resume=self.plan.resume)
        if run_files.POINTER in held:
            run_files.restore(self.folder, self.federation, self.identity)
        if run_files.RESULT in held:
            return Course(**read_json(self.folder / run_files.RESULT))
        self.log = run_files.read_log(self.folder / run_files.LOG, self.federation.round)
        return None

    def step(self) -> None:
        """One round, its evaluation if it is due, its line in the log, and then its checkpoint."""
        f, started = self.federation, time.monotonic()
        replies = run_round(f, threads=self.threads)
        seconds = time.monotonic() - started
        if not bool(f.server["model"].isfinite().all()):
            raise ValueError(
                f"{self.chosen.name}: the model has numbers that are not finite after round {f.round}; try a smaller "
                f"lr than {f.schedule.lr}"
            )
        is_due = f.round % self.plan.evaluate_every == 0 or f.round == self.plan.schedule.rounds
        scores = [asdict(evaluate.score(logits, self.data.test_y)) for logits in self.outputs()[0]] if is_due else []
        entry = {
            "round": f.round - 1, "clients": len(replies.clients), "seconds": round(seconds, 4),
            "moved": float(replies.lengths.sqrt().mean()), "networks": scores,
            **({"clipped": f.sums.clipped} if f.sums else {}),
        }  # fmt: skip
        self.log.append(entry)
        if self.folder:
            run_files.append(self.folder / run_files.LOG, entry)
            run_files.save(self.folder, f, self.identity)

    def finish(self) -> Course:
        """The course, written beside the model."""
        f, C = self.federation, self.data.classes
        votes, features = self.outputs()
        mended = repair(f, self.laid.clean, self.laid.rates)
        mine = torch.cat(list(self.laid.holdings.owned))
        K = len(self.laid.rates)
        listed = K <= MOST_LISTED
        course = Course(
            method=self.chosen.name, noise=self.noise, seed=self.seed,
            rounds=[entry["networks"] for entry in self.log],
            confusion=[evaluate.confusion(logits, self.data.test_y).tolist() for logits in votes],
            transition=counted_matrix(self.laid.clean[mine], self.laid.holdings.y[mine], C).tolist(),
            rates=self.laid.rates.tolist() if listed else [],
            by_client=shaped(f.server, (K,)) if listed else {}, by_class=shaped(f.server, (C, C)),
            spectrum=[evaluate.spectrum(of).tolist() for of in features], found=mended.found,
            labels=None if mended.before is None or mended.after is None else [mended.before, mended.after],
            model=hashlib.sha256(f.server["model"].contiguous().numpy().data).hexdigest(),
            clipped=sum(entry.get("clipped", 0) for entry in self.log),
            seconds=sum(entry["seconds"] for entry in self.log),
        )  # fmt: skip
        if self.folder:
            run_files.save_model(self.folder / run_files.MODEL, f)
            write_json(self.folder / run_files.RESULT, asdict(course))
        return course

    def outputs(self) -> tuple[Tensor, list[Tensor]]:
        """On the test: logits [V, T, C], of each network or of what they say together, and W times features [T, d]."""
        f = self.federation
        each = [evaluate.look(f.network, row, self.data.test_x) for row in f.server["model"]]
        return f.method.vote(torch.stack([logits for logits, _ in each])), [of for _, of in each]


def shaped(server: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Any]:
    """The server's tensors of one shape, as lists."""
    return {name: value.double().tolist() for name, value in server.items() if tuple(value.shape) == shape}


def slug(text: str) -> str:
    """A name for a folder, one for each text."""
    plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in text)[:40].strip("-.")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
