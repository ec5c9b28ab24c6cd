"""Safetensors files in pieces: what the library reads back, and what it would refuse is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anabranch.common.tensor_file import DTYPES, read_header, tensor_writer

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.tuples(st.sampled_from([*DTYPES.values()]), shapes)
layouts = st.dictionaries(st.text(min_size=1, max_size=8), kinds, max_size=6)


@given(layouts, st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_library_reads_what_was_written_in_pieces(tmp_path_factory, layout, step, random):
    path = tmp_path_factory.mktemp("pieces") / "x.safetensors"
    tensors = {
        name: torch.tensor([random.randrange(2) for _ in range(torch.Size(shape).numel())]).to(dtype).reshape(shape)
        for name, (dtype, shape) in layout.items()
    }
    pieces = [(name, at) for name, x in tensors.items() for at in range(0, x.numel(), step)]
    random.shuffle(pieces)
    with tensor_writer(path, layout, {"format": "pt", "é": "ü"}) as write:
        for name, at in pieces:
            write(name, at, tensors[name].flatten()[at : at + step])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tolist() == x.tolist()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "é": "ü"}


def test_a_header_says_where_tensors_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    values = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    save_file({"b": torch.ones(3).bfloat16(), "a": values}, path, metadata={"round": "3"})
    tensors, metadata = read_header(path)
    assert metadata == {"round": "3"}
    assert {name: (x.dtype, x.shape) for name, x in tensors.items()} == {"a": ("I32", (2, 3)), "b": ("BF16", (3,))}
    at = tensors["a"].offset
    assert path.read_bytes()[at : at + 24] == values.numpy().tobytes()


def test_tensors_lie_at_multiples_of_their_size(tmp_path):
    path = tmp_path / "x.safetensors"
    with tensor_writer(path, {"mask": (torch.bool, (3,)), "w": (torch.float32, (2,)), "h": (torch.float16, (1,))}, {}):
        pass
    tensors, _ = read_header(path)
    assert all(stored.offset % DTYPES[stored.dtype].itemsize == 0 for stored in tensors.values())


@pytest.mark.parametrize("content", [b"", b"\x08", (1 << 60).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_what_is_no_safetensors_file_is_named(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
        read_header(path)


def test_a_file_cut_short_and_one_that_overlaps_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut short"):
        read_header(path)
    twice = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}).encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + bytes(4))
    with pytest.raises(ValueError, match="cannot be read"):
        read_header(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*y\.safetensors"):
        read_header(tmp_path / "y.safetensors")


def test_what_went_wrong_behind_ones_back_is_raised(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)

    def fill(writes):
        with tensor_writer(tmp_path / "x", {"w": (torch.float32, (4,))}, {}) as write:
            for at in range(writes):
                write("w", at, torch.ones(1))

    for writes in (1, 3):
        with pytest.raises(OSError, match="No space left"):
            fill(writes)
