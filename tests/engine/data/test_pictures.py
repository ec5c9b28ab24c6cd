"""Pictures from folders: one size or resized, in the order of their names."""

import numpy as np
import pytest
from PIL import Image

from anabranch.data.pictures import class_folders, decode


def draw(path, *, size=(6, 4), shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade, dtype=np.uint8)).save(path)


def test_folders_are_classes_by_name(tmp_path):
    for i, name in enumerate(("dog/2.png", "cat/1.png", "dog/1.png", "cat/deep/0.png")):
        draw(tmp_path / name, shade=50 * i)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    paths, labels, names = class_folders(tmp_path)
    assert (names, labels) == (["cat", "dog"], [0, 0, 1, 1])
    assert [path.name for path in paths] == ["1.png", "0.png", "1.png", "2.png"]
    assert decode(paths, size=None)[:, 0, 0, 0].tolist() == [50, 150, 100, 0]


def test_one_size_or_a_size_that_all_are_brought_to(tmp_path):
    draw(tmp_path / "a/1.png")
    draw(tmp_path / "a/2.png", size=(9, 9))
    paths, _, _ = class_folders(tmp_path)
    with pytest.raises(ValueError, match="6 x 4 and 9 x 9; give --picture-size"):
        decode(paths, size=None)
    assert decode(paths, size=8).shape == (2, 8, 8, 3)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"no picture at all")
    paths, _, _ = class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read"):
        decode(paths, size=None)
    with pytest.raises(ValueError, match="holds no pictures"):
        class_folders(tmp_path / "a")
