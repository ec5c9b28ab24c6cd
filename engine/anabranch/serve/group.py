"""The ranks of one model as processes on one machine: sums and gathers over torch.distributed.

CPU    gloo over loopback. Its listening sockets take part in no authentication: any user of the machine can connect to
       them, so a machine shared with people who are not trusted is no place for it.
CUDA   NCCL, rank r on GPU r. Written against its documentation and not yet run: there was never a second GPU. Its
       exchanges are queued, so a rank that dies leaves the others' GPUs waiting; rank 0 then aborts them. A rank that
       lives but does not answer runs into torch's watchdog, which ends the whole process after the timeout.

Process groups are made directly and not through `init_process_group`, which would be the caller's one default group:
several models may live in a process, beside whatever that process itself does with torch.distributed.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from anabranch.models.shard import split

EXCHANGE_TIMEOUT = timedelta(minutes=5)  # compiling a kernel may hold one rank up; one that dies is noticed at once


def place(device: torch.device, rank: int) -> torch.device:
    """Where a rank computes."""
    return torch.device(device.type, rank) if device.type == "cuda" else device


class ProcessGroup:
    """One process's end of a group. It has a rank from the start, and partners once all of them have connected."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._backend: Any = None
        self._on_gpu = self._aborted = False

    def connect(self, rendezvous: Path, device: torch.device) -> None:
        """Meet the other ranks at a file, which must lie where nobody else can write.

        Now and in every exchange a rank waits EXCHANGE_TIMEOUT for another, then raises RuntimeError.
        """
        store = dist.FileStore(str(rendezvous), self.size)  # type: ignore[attr-defined]
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = EXCHANGE_TIMEOUT
            self._backend = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            self._backend.eager_connect_single_device(device)
            self._on_gpu = True
            return
        gloo: Any = dist.ProcessGroupGloo  # its annotations lag behind
        options = gloo._Options()
        options._timeout = EXCHANGE_TIMEOUT
        options._threads = 1  # exchanges come one after another
        # without a name gloo listens at whatever address the machine's own name has
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self._backend = gloo(store, self.rank, self.size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on every rank; x is overwritten."""
        self._backend.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """On rank 0 the columns of all ranks, [n, total] from [n, len(split(total, rank, size))]; elsewhere x."""
        widths = [len(split(total, rank, self.size)) for rank in range(self.size)]
        even = F.pad(x, (0, max(widths) - x.shape[1]))  # all must send as many
        parts = [torch.empty_like(even) for _ in widths] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._backend.gather([parts] if parts else [], [even], options).wait()
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1) if parts else x

    def settle(self) -> None:
        """Wait for the exchanges so far; RuntimeError if `abort` cut one short. gloo's are over when they return."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        if self._aborted:
            raise RuntimeError("an exchange was cut short")

    def abort(self) -> None:
        """End exchanges that wait for a rank that is gone. gloo's fail by themselves: the connection breaks."""
        self._aborted = True
        backend = self._backend  # `close` may come from another thread
        if self._on_gpu and backend is not None:
            backend.abort()

    def close(self) -> None:
        """Leave; exchanges that others wait in fail."""
        self.abort()
        self._backend = None
