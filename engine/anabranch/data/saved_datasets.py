"""A folder that Hugging Face's `datasets` saved: pictures or texts with a column of labels. The extra `datasets`."""

from pathlib import Path
from typing import Any

import torch

from anabranch.data import pictures
from anabranch.data.labelled import Labelled
from anabranch.data.words import labelled_texts


def read_saved(folder: Path, size: int | None) -> Labelled:
    """One set, of which a quarter is the test, or sets named train and test.

    Each has a column `label` or `labels` of classes, and one of pictures (`image`, `img`) or texts (`text`).
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ImportError(f"{folder} is read by Hugging Face's library: pip install 'anabranch[datasets]'") from error
    saved = load_from_disk(str(folder))
    sets = [saved]
    if isinstance(saved, DatasetDict):
        if not {"train", "test"} <= set(saved):
            raise ValueError(f"{folder} must hold the sets train and test, got {sorted(saved)}")
        sets = [saved["train"], saved["test"]]
    label = _column(folder, sets[0], ("label", "labels"))
    names = getattr(sets[0].features[label], "names", None)
    labels = [int(one) for part in sets for one in part[label]]
    names = list(names) if names else [str(i) for i in range(max(labels) + 1)]
    shown = _column(folder, sets[0], ("image", "img", "text"))
    count = len(sets[0]) if len(sets) == 2 else 0
    if shown == "text":
        texts = [one for part in sets for one in part[shown]]
        return labelled_texts(folder.name, texts, torch.tensor(labels), count, names)
    pixels = pictures.decode([one for part in sets for one in part[shown]], size=size)
    return pictures.labelled(folder.name, pixels, torch.tensor(labels), count, names)


def _column(folder: Path, part: Any, names: tuple[str, ...]) -> str:
    found = [name for name in names if name in part.column_names]
    if not found:
        raise ValueError(f"{folder} must have a column named one of {list(names)}, got {part.column_names}")
    return found[0]
