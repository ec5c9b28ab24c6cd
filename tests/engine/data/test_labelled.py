"""A classification task is checked once, when it is read."""

import pytest
import torch

from anabranch.data.labelled import Labelled, split


def task(**changes):
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    given = {"name": "t", "kind": "vector", "x": x, "y": y, "test_x": x[:2], "test_y": y[:2], "names": "abc"}
    return Labelled(**{**given, **changes})


def test_classes_are_counted_by_name():
    assert task().classes == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "image"}, "4 dimensions"),
        ({"test_x": torch.zeros(2, 3)}, "dimensions"),
        ({"y": torch.tensor([0, 1, 2, 3, 1, 2])}, "0 to 2"),
        ({"y": torch.tensor([0, 1])}, "6 numbers"),
        ({"test_x": torch.zeros(0, 2), "test_y": torch.zeros(0).long()}, "at least one"),
        ({"given": {"worse": torch.tensor([0, 9, 0, 0, 0, 0])}}, "labels 'worse'"),
        ({"names": "a", "y": torch.zeros(6).long(), "test_y": torch.zeros(2).long()}, "two classes"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        task(**changes)


def test_a_quarter_is_put_aside_and_always_the_same():
    y = torch.arange(41)
    parts = split(y * 2, y)
    assert len(parts.test_y) == 10
    assert sorted([*parts.y.tolist(), *parts.test_y.tolist()]) == y.tolist()
    assert torch.equal(parts.x, parts.y * 2)
    assert torch.equal(parts.test_y, split(y, y).test_y)
