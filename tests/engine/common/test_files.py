"""Files that are either whole or not there."""

from pathlib import Path

import pytest

from anabranch.common.files import check_targets, replace_file


def test_a_file_is_replaced_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "notes.txt"
    for text in ("first", "second"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ha")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, write_half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        check_targets([tmp_path / "a.json", tmp_path / "nowhere" / "b.json"])
