"""Classification data as they were published: read from where the user put them."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from anabranch.data import pictures
from anabranch.data.arrays import read_arrays, read_npz
from anabranch.data.labelled import Labelled
from anabranch.data.words import labelled_texts

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NEWS = ("World", "Sports", "Business", "Sci/Tech")
PEOPLE = {"aggre": "aggre_label", "worse": "worse_label"} | {f"random{i}": f"random_label{i}" for i in (1, 2, 3)}


def read_fashion_mnist(path: Path) -> Labelled:
    """An .npz of all pictures with their clients (or a folder with one); see `read_npz`."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ValueError(f"{path} must hold one .npz, got {[file.name for file in files]}")
    return replace(read_npz(files[0], FASHION), name="fashion-mnist")


def read_cifar10n(folder: Path) -> Labelled:
    """CIFAR-10 as JPEGs (cifar10_jpeg.npz.xz) with the labels of people (cifar10n_labels.npz), arXiv 2110.12088."""
    stored = read_arrays(folder / "cifar10_jpeg.npz.xz")
    labels = read_arrays(folder / "cifar10n_labels.npz")
    parts = {}
    for part in ("train", "test"):
        buffer, offsets = stored[f"{part}_buf"].tobytes(), stored[f"{part}_off"].tolist()
        each = [buffer[begin:end] for begin, end in pairwise(offsets)]
        parts[part] = pictures.decode(each, size=None)
    x, test_x = pictures.standardise(parts["train"], parts["test"])
    as_numbers = {name: torch.from_numpy(array.astype(np.int64)) for name, array in labels.items()}
    y, test_y = (torch.from_numpy(stored[f"{part}_label"].astype(np.int64)) for part in ("train", "test"))
    if not torch.equal(y, as_numbers["clean_label"]):
        raise ValueError(f"{folder}: the labels of people belong to other pictures, or to these in another order")
    given = {name: as_numbers[key] for name, key in PEOPLE.items()}
    return Labelled(
        name="cifar10n", kind="image", x=x, y=y, test_x=test_x, test_y=test_y, names=CIFAR10, given=given
    )  # fmt: skip


def read_banking77(folder: Path) -> Labelled:
    """train.csv and test.csv (or .csv.gz) with the columns text and category."""
    parts = {part: list(csv.DictReader(_lines(folder, part))) for part in ("train", "test")}
    columns = set(parts["train"][0]) if parts["train"] else set()
    if not {"text", "category"} <= columns:
        raise ValueError(f"{folder}/train.csv must have the columns text and category, got {sorted(columns)}")
    names = sorted({row["category"] for row in parts["train"]})
    number = {name: i for i, name in enumerate(names)}
    texts = [row["text"] for part in parts.values() for row in part]
    try:
        labels = torch.tensor([number[row["category"]] for part in parts.values() for row in part])
    except KeyError as error:
        raise ValueError(f"{folder}/test.csv has the category {error}, which train.csv has not") from error
    return labelled_texts("banking77", texts, labels, len(parts["train"]), names)


def read_ag_news(folder: Path) -> Labelled:
    """test.csv (or .csv.gz) of class, title, description, and train.csv if it is there; else a quarter is the test."""
    rows = list(csv.reader(_lines(folder, "test")))
    has_train = any((folder / f"train.csv{ending}").is_file() for ending in ("", ".gz"))
    train = list(csv.reader(_lines(folder, "train"))) if has_train else []
    texts = [" ".join(row[1:]) for row in train + rows]
    labels = torch.tensor([int(row[0]) - 1 for row in train + rows])
    listed = folder / "classes.txt"
    names = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else NEWS
    return labelled_texts("ag-news", texts, labels, len(train), [name.strip() for name in names if name.strip()])


def _lines(folder: Path, part: str) -> Iterator[str]:
    """The lines of PART.csv or PART.csv.gz."""
    plain, packed = folder / f"{part}.csv", folder / f"{part}.csv.gz"
    if plain.is_file():
        with plain.open(encoding="utf-8", newline="") as file:
            yield from file
    elif packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8", newline="") as file:
            yield from file
    else:
        raise ValueError(f"{folder} has neither {plain.name} nor {packed.name}")
