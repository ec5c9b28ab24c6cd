"""What `--data` may name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anabranch.data.sources import Source, load, parse_source


def test_names_paths_and_both():
    assert parse_source("digits") == Source("digits", None)
    assert parse_source("ag-news=here") == Source("ag-news", Path("here"))
    assert parse_source("ag-news", Path("root")) == Source("ag-news", Path("root/ag-news"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mnist=here", "unknown data 'mnist'"),
        ("banking77", "where does banking77 lie"),
        ("nowhere.npz", "no such data"),
    ],
)
def test_what_leads_nowhere_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_source(text)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        load(parse_source(f"banking77={tmp_path / 'gone'}"))


def test_the_digits():
    found = load(parse_source("digits"))
    assert (len(found.y), len(found.test_y), found.classes) == (1348, 449, 10)
    assert (float(found.x.min()), float(found.x.max())) == (0.0, 1.0)


def test_files_and_folders_are_told_apart(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.zeros((8, 3)), y=np.arange(8) % 2)
    assert load(parse_source(str(tmp_path / "own.npz"))).name == "own"
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / "animals" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((4, 4, 3), 60 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    found = load(parse_source(str(tmp_path / "animals")))
    assert (found.names, found.y.tolist(), found.test_y.tolist()) == (["cat", "dog"], [0, 0, 0, 1, 1, 1], [0, 1])
    assert load(parse_source(str(tmp_path / "animals" / "train")), picture_size=2).x.shape[1:] == (3, 2, 2)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    for folder in ("train/cat", "test/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match="same classes"):
        load(parse_source(str(tmp_path)))
