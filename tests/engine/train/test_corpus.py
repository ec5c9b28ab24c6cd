"""The corpus: what is read, that held-out text is never trained on, and that batches continue anywhere."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anabranch.train.corpus import (
    BOS,
    EOS,
    Batches,
    find_files,
    held_out_windows,
    read_corpus,
    standard_library,
)


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
    with pytest.raises(ValueError, match="not a text file"):
        find_files([str(write(tmp_path, [content])[0])])


def test_the_standard_library_is_library_code_only():
    paths = standard_library()
    names = {path.name for path in paths}
    parts = {part for path in paths for part in path.parts}
    assert {"argparse.py", "dataclasses.py", "heapq.py"} <= names
    assert not {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"} & parts
    assert len(paths) > 200


def batches(n: int, context: int, batch: int, seed: int = 0) -> Batches:
    return Batches(stream=torch.arange(n, dtype=torch.int16), context=context, batch=batch, seed=seed)


@given(st.integers(0, 400), st.integers(1, 7), st.integers(1, 5), st.integers(0, 30), st.integers(0, 5))
def test_a_batch_is_a_run_of_the_stream_and_its_successors(more, context, batch, step, seed):
    source = batches(2 * context + 1 + more, context, batch, seed)
    inputs, targets = source.at(step)
    assert inputs.shape == targets.shape == (batch, context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the stream counts up
    again, _ = batches(2 * context + 1 + more, context, batch, seed).at(step)
    assert torch.equal(inputs, again)


def test_an_epoch_visits_each_window_once_and_the_next_in_another_order():
    source = batches(1000, 10, 7)
    rows = torch.cat([source.at(step)[0] for step in range(2 * source.windows // 7 + 1)])
    first, second = rows[: source.windows], rows[source.windows : 2 * source.windows]
    for epoch in (first, second):
        assert epoch.unique().numel() == epoch.numel()  # no token twice
        assert epoch.numel() >= 1000 - 3 * 10
    assert not torch.equal(first, second)


def test_seeds_give_different_batches():
    assert not torch.equal(batches(1000, 10, 7, seed=0).at(0)[0], batches(1000, 10, 7, seed=1).at(0)[0])


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"shorter than the context: 20 tokens.* at least 21"):
        batches(20, 10, 1)


@given(st.integers(2, 60), st.integers(1, 17))
def test_held_out_windows_predict_each_token_once(n, context):
    stream = torch.randint(258, (n,)).to(torch.int16)
    inputs, targets = held_out_windows(stream, context)
    kept = targets.flatten() != -100
    assert torch.equal(targets.flatten()[kept], stream[1:].long())
    assert torch.equal(inputs.flatten()[kept], stream[:-1].long())


def test_a_limit_spreads_the_held_out_windows():
    inputs, _ = held_out_windows(torch.arange(101, dtype=torch.int16), 10, 5)
    assert inputs[:, 0].tolist() == [0, 20, 40, 60, 80]


def test_nothing_held_out_is_refused():
    with pytest.raises(ValueError, match="nothing to measure on"):
        held_out_windows(torch.zeros(1, dtype=torch.int16), 10)
