"""The corpus: what is read, and that held-out text is never trained on."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anabranch.train.corpus import BOS, EOS, read_corpus, standard_library


def write(folder: Path, contents: list[bytes]) -> list[Path]:
    paths = [folder / f"{i}.txt" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def files_in(stream: Tensor) -> list[bytes]:
    """The files of a stream, by reading its marks."""
    files: list[bytes] = []
    current: list[int] | None = None
    for token in stream.tolist():
        if token == BOS:
            assert current is None
            current = []
        elif token == EOS:
            assert current is not None
            files.append(bytes(current))
            current = None
        else:
            assert current is not None
            current.append(token)
    assert current is None
    return files


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=12), st.floats(0.05, 0.9))
def test_every_file_is_either_trained_on_or_held_out(tmp_path_factory, contents, share):
    if len(set(contents)) < 2:
        contents = [*contents, contents[0] + b"x"]
    corpus = read_corpus(write(tmp_path_factory.mktemp("text"), contents), held_out=share)
    train, held = files_in(corpus.train), files_in(corpus.held_out)
    assert train
    assert held
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(set(contents))
    assert corpus.files == len(set(contents))
    assert corpus.held_out_files == len(held)


def test_the_split_does_not_depend_on_names_or_order(tmp_path):
    contents = [bytes([65 + i]) * (10 + i) for i in range(20)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = read_corpus(write(tmp_path / "a", contents))
    two = read_corpus(write(tmp_path / "b", contents[::-1]))
    assert one.sha256 == two.sha256
    assert torch.equal(one.train, two.train)
    assert torch.equal(one.held_out, two.held_out)


def test_a_single_file_is_cut_near_its_end(tmp_path):
    corpus = read_corpus(write(tmp_path, [bytes(range(100))]), held_out=0.1)
    assert files_in(corpus.train) == [bytes(range(90))]
    assert files_in(corpus.held_out) == [bytes(range(90, 100))]
    assert corpus.held_out_files == 0


@pytest.mark.parametrize("contents", [[], [b""], [b"", b""]])
def test_an_empty_corpus_is_refused(tmp_path, contents):
    with pytest.raises(ValueError, match="the corpus is empty"):
        read_corpus(write(tmp_path, contents))


def test_one_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one byte"):
        read_corpus(write(tmp_path, [b"x"]))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_held_out_share_outside_its_range_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match="share between 0 and 1"):
        read_corpus(write(tmp_path, [b"some text"]), held_out=share)


def test_the_standard_library_is_library_code_only():
    paths = standard_library()
    names = {path.name for path in paths}
    parts = {part for path in paths for part in path.parts}
    assert {"argparse.py", "dataclasses.py", "heapq.py"} <= names
    assert not {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"} & parts
    assert len(paths) > 200
