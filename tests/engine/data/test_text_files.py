"""Which files a name, a folder or a pattern stands for. What is read and split is tested with the corpus of train."""

import pytest

from anabranch.data.text_files import find_files


def test_files_folders_and_patterns_are_found_once(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "deep" / "b.py").write_text("b")
    (tmp_path / "deep" / ".hidden" / "c.py").write_text("c")
    (tmp_path / "deep" / "picture").write_bytes(b"\x00\xff")
    found = find_files([str(tmp_path / "a.py"), str(tmp_path), str(tmp_path / "**" / "*.py")])
    assert sorted(path.name for path in found) == ["a.py", "b.py"]


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file or folder.*missing\.txt"):
        find_files([str(tmp_path / "missing.txt")])
    with pytest.raises(ValueError, match="no match as a pattern"):
        find_files([str(tmp_path / "*.py")])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_a_named_file_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a text file"):
        find_files([str(path)])
