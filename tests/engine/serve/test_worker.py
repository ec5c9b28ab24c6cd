"""What a worker is told: messages survive the pipe. What it does is tested through `LLM` (test_tensor_parallel.py)."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from io import BufferedReader, BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anabranch.serve.runner import Batch
from anabranch.serve.worker import CACHES, Settings, encode, read_message, unpack_batch

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


def test_the_group_is_never_torn_down_so_that_no_rank_waits_for_a_file_another_has_removed(data, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    settings = Settings(
        folder=str(data("stories260k")), rank=0, size=1, dtype=None, device="cpu", threads=1,
        rendezvous=str(meeting / "ranks"), leader=os.getpid(),
    )  # fmt: skip
    program = (
        "import json, sys\n"
        "from anabranch.serve import group, worker\n"
        "group.ProcessGroup.__del__ = lambda self: print('torn down', file=sys.stderr, flush=True)\n"
        "worker.main(worker.Settings(**json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-P", "-c", program, json.dumps(asdict(settings))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    message = encode(CACHES, [np.array([4, 8, 0])])
    ended = subprocess.run(command, input=message, capture_output=True, env=environment, check=False)
    assert ended.returncode == 0
    assert [list(json.loads(line)) for line in ended.stdout.splitlines()] == [["budget"], ["caches"]]
    assert b"torn down" not in ended.stderr
    assert not meeting.exists()
