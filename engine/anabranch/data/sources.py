"""Where classification data come from: scikit-learn, files as they are published, and what users have.

    digits                                  8 by 8 pixels, within scikit-learn
    digits-shortcut                         with a colour that tells the class inside each of 20 clients: shortcuts.py
    fashion-mnist cifar10n banking77 ag-news=PATH   as published, files or a folder of them
    FILE.npz                                x and y, and more if it is there: see `arrays.read_npz`
    FOLDER                                  of folders of pictures named for their classes, or saved by `datasets`

Nothing is downloaded and nothing unpickled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from anabranch.data import pictures
from anabranch.data.arrays import read_npz
from anabranch.data.labelled import Labelled, split
from anabranch.data.published import read_ag_news, read_banking77, read_cifar10n, read_fashion_mnist
from anabranch.data.shortcuts import with_shortcut


class Source(NamedTuple):
    """What `--data` names: one of `PUBLISHED` with where it lies, or a path alone."""

    name: str
    path: Path | None


def parse_source(text: str, root: Path | None = None) -> Source:
    """NAME, NAME=PATH or PATH; a NAME alone lies below `root`. ValueError says what is missing."""
    name, given, path = text.partition("=")
    if given:
        if name not in PUBLISHED:
            raise ValueError(f"unknown data {name!r}; before '=' stands one of {sorted(PUBLISHED)}")
        return Source(name, Path(path))
    if text in MADE:
        return Source(text, None)
    if text in PUBLISHED:
        if root is None:
            raise ValueError(f"where does {text} lie? Give --data {text}=PATH, or --data-root for the folder above it")
        return Source(text, root / text)
    if not Path(text).exists():
        raise ValueError(
            f"there is no file or folder {text}, and no such data: choose one of {sorted((*MADE, *PUBLISHED))}"
        )
    return Source("", Path(text))


def load(source: Source, *, picture_size: int | None = None) -> Labelled:
    """Read a data set. ValueError for what is not there or not what it should be, ImportError naming a missing extra.

    picture_size    pixels a side that pictures of folders are resized to
    """
    if source.path is None:
        return MADE[source.name]()
    if not source.path.exists():
        raise ValueError(f"there is no {source.path}")
    if source.name:
        return PUBLISHED[source.name](source.path)
    if source.path.is_file():
        return read_npz(source.path)
    if any((source.path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        from anabranch.data.saved_datasets import read_saved

        return read_saved(source.path, picture_size)
    return read_pictures(source.path, picture_size)


def read_digits() -> Labelled:
    """scikit-learn's 1797 digits of 64 pixels in [0, 1]; a quarter is the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's: pip install 'anabranch[federated]'") from error
    pixels, labels = load_digits(return_X_y=True)
    parts = split(torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long())
    return Labelled(name="digits", kind="vector", **parts._asdict(), names=[str(i) for i in range(10)])


def read_pictures(folder: Path, size: int | None) -> Labelled:
    """FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS/ and FOLDER/test/CLASS/; without a test a quarter is one."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        (train, y, names), (test, test_y, test_names) = map(pictures.class_folders, (folder / "train", folder / "test"))
        if names != test_names:
            raise ValueError(f"{folder}: train and test must have the same classes, got {names} and {test_names}")
        paths, labels, count = train + test, torch.tensor(y + test_y), len(train)
    else:
        paths, y, names = pictures.class_folders(folder)
        labels, count = torch.tensor(y), 0
    pixels = pictures.decode(paths, size=size)
    return pictures.labelled(folder.name, pixels, labels, count, names)


def read_digits_shortcut() -> Labelled:
    """The digits with colours."""
    return with_shortcut(read_digits())


MADE: dict[str, Callable[[], Labelled]] = {"digits": read_digits, "digits-shortcut": read_digits_shortcut}
PUBLISHED: dict[str, Callable[[Path], Labelled]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10n": read_cifar10n,
    "banking77": read_banking77,
    "ag-news": read_ag_news,
}
