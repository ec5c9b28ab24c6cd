"""A worker process: one rank's part of a model and its caches, computing what rank 0 announces.

    python -P -m anabranch.serve.worker SETTINGS      started by tensor_parallel.Workers, never by hand

It reads messages from its standard input and ends with it, so a rank 0 that closes, exits or is killed leaves no worker
behind; a worker that waits for something else looks for its parent every second. To the standard output it writes JSON
lines: {"budget": bytes} once its part is loaded, {"caches": blocks} once it has those, and {"error": text} before it
ends for a reason of its own.

A message is a frame of int64, [words, kind, arrays, their lengths..., their contents...]: numbers only, nothing is
unpickled. Rank 0 alone holds the other end of the pipe.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.models.weights import load_model
from anabranch.serve.group import ProcessGroup, place
from anabranch.serve.memory import cache_budget
from anabranch.serve.runner import CACHE_DTYPES, Batch, Integers, compute, make_caches, score

CACHES, FORWARD, LOGITS = range(3)  # kinds of messages, in the order of their first appearance
WORD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a worker is started with, as JSON in its only argument.

    dtype       of the weights, a name in torch; None keeps the stored one
    rendezvous  the file at which the ranks meet
    leader      process id of rank 0
    """

    folder: str
    rank: int
    size: int
    dtype: str | None
    device: str
    threads: int
    rendezvous: str
    leader: int


def encode(kind: int, arrays: Sequence[Integers]) -> bytes:
    """One message as bytes."""
    head = [kind, len(arrays), *(array.size for array in arrays)]
    words = np.concatenate([[0], head, *(array.ravel() for array in arrays)]).astype(np.int64, copy=False)
    words[0] = len(words) - 1
    return words.tobytes()


def read_message(stream: BufferedReader) -> tuple[int, list[NDArray[np.int64]]] | None:
    """The next message of a stream; None at its end, also if that comes in the middle of one."""
    words = _read_words(stream, 1)
    body = None if words is None else _read_words(stream, int(words[0]))
    if body is None:
        return None
    kind, count = int(body[0]), int(body[1])
    ends = np.cumsum(body[2 : 2 + count])[:-1]
    return kind, np.split(body[2 + count :], ends)


def _read_words(stream: BufferedReader, count: int) -> NDArray[np.int64] | None:
    data = bytearray(count * WORD)  # writable, as torch wants what it is to share
    read = stream.readinto(data)
    return np.frombuffer(data, np.int64) if read == len(data) else None


def unpack_batch(arrays: Sequence[NDArray[np.int64]]) -> Batch:
    """A Batch as it was before it became words."""
    tokens, positions, slots, table, lens, starts = arrays
    small = table.reshape(len(lens), -1), lens, starts
    return Batch(tokens, positions, slots, *(array.astype(np.int32) for array in small))


def serve(
    settings: Settings, group: ProcessGroup, messages: BufferedReader, say: Callable[[dict[str, object]], None]
) -> None:
    """Load, report and compute until the messages end. `say` sends an object to rank 0."""
    device = place(torch.device(settings.device), settings.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(settings.threads)
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model = load_model(settings.folder, dtype=dtype, device=device, group=group)
    say({"budget": cache_budget(device, settings.size)})
    message = read_message(messages)
    if message is None:
        return
    assert message[0] == CACHES
    num_blocks, block_size, code = message[1][0].tolist()
    caches = make_caches(model.config, num_blocks, block_size, list(CACHE_DTYPES.values())[code], device)
    say({"caches": num_blocks})
    group.connect(Path(settings.rendezvous), device)
    hidden = model.embed[:0]
    with torch.inference_mode():
        while (message := read_message(messages)) is not None:
            kind, arrays = message
            if kind == FORWARD:
                hidden = compute(model, caches, unpack_batch(arrays))
            else:
                assert kind == LOGITS
                score(model, hidden, arrays[0])


def _end_with(leader: int, rendezvous: Path) -> None:
    """End this process, whatever it waits for, when its parent is gone."""
    while os.getppid() == leader:
        time.sleep(1)
    _leave(rendezvous)
    os._exit(1)


def _leave(rendezvous: Path) -> None:
    """Remove the folder where the ranks met: one that is killed cannot, and the first to end ends the group."""
    shutil.rmtree(rendezvous.parent, ignore_errors=True)


def main(settings: Settings) -> NoReturn:
    """Serve and end the process, with status 0 once the messages have ended.

    It ends without destructors: a FileStore's looks whether its file is there, then opens it and waits minutes for one
    that another rank has removed meanwhile.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    rendezvous = Path(settings.rendezvous)
    threading.Thread(target=_end_with, args=(settings.leader, rendezvous), daemon=True).start()

    def say(reply: dict[str, object]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    group = ProcessGroup(settings.rank, settings.size)
    status = 1
    try:
        with open(0, "rb") as messages:
            serve(settings, group, messages, say)
        status = 0
    except Exception as error:
        traceback.print_exc()
        with suppress(BrokenPipeError):
            say({"error": f"{type(error).__name__}: {error}"})
    finally:
        _leave(rendezvous)
        os._exit(status)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
