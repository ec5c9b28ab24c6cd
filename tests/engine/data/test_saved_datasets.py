"""Folders that Hugging Face's library saved."""

import numpy as np
import pytest
from PIL import Image

from anabranch.data.saved_datasets import read_saved

datasets = pytest.importorskip("datasets")


def test_texts_with_a_test_of_their_own(tmp_path):
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    parts = {
        "train": datasets.Dataset.from_dict({"text": ["fine", "poor", "nice"], "label": [1, 0, 1]}, features=features),
        "test": datasets.Dataset.from_dict({"text": ["dull"], "label": [0]}, features=features),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "reviews")
    found = read_saved(tmp_path / "reviews", None)
    assert (found.name, found.kind, found.names, found.y.tolist()) == ("reviews", "text", ["bad", "good"], [1, 0, 1])
    assert found.test_y.tolist() == [0]


def test_pictures_of_which_a_quarter_is_the_test(tmp_path):
    pictures = [Image.fromarray(np.full((5, 5, 3), 20 * i, dtype=np.uint8)) for i in range(8)]
    saved = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 4}).cast_column("img", datasets.Image())
    saved.save_to_disk(tmp_path / "shades")
    found = read_saved(tmp_path / "shades", None)
    assert (found.kind, found.x.shape, len(found.test_x), found.names) == ("image", (6, 3, 5, 5), 2, ["0", "1"])


def test_columns_that_are_missing_are_named(tmp_path):
    datasets.Dataset.from_dict({"words": ["a"], "label": [0]}).save_to_disk(tmp_path / "x")
    with pytest.raises(ValueError, match=r"image.*text.*got \['words', 'label'\]"):
        read_saved(tmp_path / "x", None)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"label": [0]})}).save_to_disk(tmp_path / "y")
    with pytest.raises(ValueError, match="train and test"):
        read_saved(tmp_path / "y", None)
