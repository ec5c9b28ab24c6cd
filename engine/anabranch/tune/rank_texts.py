"""Which layers get the ranks? A small transformer learns to sort news (AG News) and questions to a bank (BANKING77).

The model is given; adapters sit beside all its linear layers, and a linear head reads the mean of a text's last states.
AG News is split by the study: of the file of 7,600 texts that is called its test, the first 1,000 after a shuffle with
a fixed seed are kept for measuring. Texts are read in lower case, which a model of children's
stories knows best.
"""

import csv
import gzip
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings, Pruning
from anabranch.adapters.attach import Adapter, attach
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import Growth, TriAdapt, TriAdaptSettings
from anabranch.common.optimise import cosine_rate, make_optimiser
from anabranch.data.tokenizer import load_tokenizer
from anabranch.models.transformer import PackedAttend, Transformer
from anabranch.models.weights import load_model

TASKS = ("ag-news", "banking77")
HELD_OUT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """`reference` ranks a layer on average; `tokens` of a text are read, and `measured` held-out texts."""

    reference: int = 4
    steps: int = 150
    batch: int = 16
    tokens: int = 48
    lr: float = 1e-2
    looks: int = 20
    measured: int = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRun:
    """accuracy  on held-out texts; ranks of each layer in the end, by its name without `model.layers.`"""

    task: str
    method: str
    seed: int
    accuracy: float
    ranks: dict[str, int]
    seconds: float
    choosing_s: float


class Texts(NamedTuple):
    """One task: ids of each text and its class, to learn from and held out."""

    train: list[tuple[list[int], int]]
    held_out: list[tuple[list[int], int]]
    classes: int


def read(data: Path, task: str, model: Path, tokens: int) -> Texts:
    """Raises ValueError where a file is missing."""
    names = {"ag-news": ("test.csv.gz",), "banking77": ("train.csv.gz", "test.csv.gz")}[task]
    files = [data / task / name for name in names]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"the task {task} needs {', '.join(missing)}; give the folder of data sets with --data")
    rows = [_rows(path, task) for path in files]
    for part in rows:  # files are sorted by class
        random.Random(0).shuffle(part)
    if len(rows) == 1:
        rows = [rows[0][HELD_OUT:], rows[0][:HELD_OUT]]
    labels = {label: index for index, label in enumerate(sorted({label for _, label in rows[0]}))}
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer to read texts with")

    def encoded(part: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
        return [(tokenizer.encode(text.lower())[:tokens], labels[label]) for text, label in part]

    return Texts(encoded(rows[0]), encoded(rows[1]), len(labels))


def _rows(path: Path, task: str) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        if task == "banking77":
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]
        return [(f"{title}. {text}", label) for label, title, text in csv.reader(file)]


def variants(s: TextSettings) -> dict[str, Any]:
    """Settings of each method by name."""
    interval = max(1, s.steps // s.looks)
    alpha = float(2 * s.reference)
    return {
        f"LoRA-{s.reference}": RankLoraSettings(ranks=s.reference, alpha=alpha),
        "TriAdapt": TriAdaptSettings(
            reference=s.reference, alpha=alpha, interval=interval, warmup=s.steps // 20, steps=s.steps
        ),
        "AdaLoRA": AdaLoraSettings(
            initial=s.reference + -(-s.reference // 2), target=s.reference, alpha=1.5 * alpha, interval=interval,
            warmup=s.steps // 10, final=s.steps // 2, steps=s.steps,
        ),
    }  # fmt: skip


def learn(
    s: TextSettings, model: Path, texts: Texts, task: str, method: str, made: Any, seed: int,
    done: Callable[[], object] = lambda: None,
) -> TextRun:  # fmt: skip
    """Train adapters and head on one task; `done` is called after every step."""
    generator = torch.Generator().manual_seed(seed)
    network = load_model(model, dtype=torch.float32)
    kinds: dict[type, Any] = {RankLoraSettings: RankLora, TriAdaptSettings: TriAdapt, AdaLoraSettings: AdaLora}
    layers: dict[str, Adapter] = attach(network, lambda _, i, o: kinds[type(made)](i, o, made, generator=generator))
    grown = {name: one for name, one in layers.items() if isinstance(one, TriAdapt)}
    pruned = {name: one for name, one in layers.items() if isinstance(one, AdaLora)}
    growth = Growth(made, grown) if grown else Pruning(made, pruned) if pruned else None
    head = nn.Linear(network.config.hidden_size, texts.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    weights = nn.ModuleList([head, *layers.values()])
    optimiser = make_optimiser(weights, lr=s.lr, weight_decay=0.0, betas=(0.9, 0.999))
    choosing, started = 0.0, time.process_time()
    for step in range(1, s.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = cosine_rate(step - 1, steps=s.steps, warmup=s.steps // 20, lr=s.lr, final_lr=0.0)
        picked = torch.randint(len(texts.train), (s.batch,), generator=generator).tolist()
        batch = [texts.train[index] for index in picked]
        loss = F.cross_entropy(head(pooled(network, batch)), torch.tensor([label for _, label in batch]))
        penalty = None if growth is None else growth.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        before = time.process_time()
        if growth is not None:
            growth.look(step)
        choosing += time.process_time() - before
        optimiser.zero_grad()
        done()
    seconds = time.process_time() - started
    ranks = {name.removeprefix("model.layers."): one.rank for name, one in (grown or pruned).items()}
    return TextRun(
        task=task, method=method, seed=seed, accuracy=accuracy(network, head, texts.held_out[: s.measured]),
        ranks=ranks, seconds=round(seconds, 3), choosing_s=round(choosing, 4),
    )  # fmt: skip


def pooled(model: Transformer, batch: list[tuple[list[int], int]]) -> Tensor:
    """[B, hidden]: of each text the mean of its last states."""
    lengths = [len(ids) for ids, _ in batch]
    tokens = torch.tensor([token for ids, _ in batch for token in ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(tokens, positions, PackedAttend(lengths))
    return torch.stack([part.mean(0) for part in hidden.split(lengths)])


@torch.no_grad()
def accuracy(model: Transformer, head: nn.Linear, texts: list[tuple[list[int], int]]) -> float:
    parts = [texts[start : start + 50] for start in range(0, len(texts), 50)]
    right = [int((head(pooled(model, part)).argmax(1) == torch.tensor([y for _, y in part])).sum()) for part in parts]
    return sum(right) / len(texts)
