"""Texts of four kinds from public data sets, as JSONL files that `anabranch tune` reads: news, bank, maths, plays.

    ag-news/test.csv.gz              title and description of a news item
    banking77/train.csv.gz           what a customer asks, and the intent
    gsm8k/train.jsonl.gz             a question and its worked answer
    tinyshakespeare/input.txt.gz     speeches

A folder that holds these data sets as their authors publish them, compressed; nothing is downloaded.
"""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from anabranch.common.files import replace_file

CHARACTERS = 120  # of an example; what is longer is cut
PARTS = {"train": 600, "validation": 40, "test": 40}  # examples of each kind


def write_texts(data: Path, out: Path) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl: the same for the same data. ValueError where data is missing.

    No example stands in two parts: examples that are equal after the cut count once.
    """
    missing = [name for name in SOURCES if not (data / name).is_file()]
    if missing:
        raise ValueError(f"{data} has no {', '.join(missing)}: the study of texts needs these data sets")
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, read in SOURCES.items():
        with gzip.open(data / name, "rt", encoding="utf-8", newline="") as file:
            texts = sorted({text.strip()[:CHARACTERS] for text in read(file)})
        needed = sum(PARTS.values())
        if len(texts) < needed:
            raise ValueError(f"{data / name} holds {len(texts)} different texts, {needed} are needed")
        drawn = iter(random.Random(0).sample(texts, needed))
        for part, count in PARTS.items():
            parts[part] += [next(drawn) for _ in range(count)]
    for part, some in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        replace_file(out / f"{part}.jsonl", lambda path, lines=lines: path.write_text(lines, encoding="utf-8"))  # type: ignore[misc]


def _news(file: IO[str]) -> Iterator[str]:
    for _, title, description in csv.reader(file):
        yield f"{title}\n{description}"


def _bank(file: IO[str]) -> Iterator[str]:
    for row in csv.DictReader(file):
        yield f"{row['text']}\nintent: {row['category']}"


def _maths(file: IO[str]) -> Iterator[str]:
    for line in file:
        row = json.loads(line)
        yield f"{row['question']}\n{row['answer']}"


def _plays(file: IO[str]) -> Iterator[str]:
    yield from (speech for speech in file.read().split("\n\n") if len(speech) > 60)


SOURCES: Mapping[str, Callable[[IO[str]], Iterator[str]]] = {
    "ag-news/test.csv.gz": _news,
    "banking77/train.csv.gz": _bank,
    "gsm8k/train.jsonl.gz": _maths,
    "tinyshakespeare/input.txt.gz": _plays,
}
