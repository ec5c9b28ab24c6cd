"""What a worker is told: messages survive the pipe. What it does is tested through `LLM` (test_tensor_parallel.py)."""

from io import BufferedReader, BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anabranch.serve.runner import Batch
from anabranch.serve.worker import encode, read_message, unpack_batch

integers = arrays(np.int64, st.integers(0, 9)) | arrays(np.int32, st.integers(0, 9))


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(integers, min_size=1, max_size=6)), max_size=4))
def test_messages_come_out_as_they_went_in(messages):
    stream = BufferedReader(BytesIO(b"".join(encode(kind, parts) for kind, parts in messages)))
    for kind, parts in messages:
        got_kind, got = read_message(stream)
        assert got_kind == kind
        assert [part.tolist() for part in got] == [part.tolist() for part in parts]
    assert read_message(stream) is None


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30])
def test_a_message_cut_short_is_an_end(cut):
    data = encode(1, [np.arange(5)])
    assert read_message(BufferedReader(BytesIO(data[:-cut]))) is None


@pytest.mark.parametrize("B", [1, 3])
def test_a_batch_keeps_its_shapes_and_dtypes(B):
    table = np.arange(B * 4, dtype=np.int32).reshape(B, 4)[:, :2]  # a view, as the runner makes it
    batch = Batch(
        np.arange(7), np.arange(7) + 1, np.arange(7) * (1 << 33), table, np.full(B, 5, np.int32),
        np.arange(B + 1, dtype=np.int32),
    )  # fmt: skip
    _, parts = read_message(BufferedReader(BytesIO(encode(1, batch))))
    for name, sent, got in zip(Batch._fields, batch, unpack_batch(parts), strict=True):
        assert np.array_equal(sent, got), name
        assert sent.dtype == got.dtype, name
        torch.from_numpy(got)  # writable: torch warns of what is not
