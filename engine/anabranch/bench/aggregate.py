"""Aggregation of clients' files beside a copy: a loop that reads the same files once and writes one of them."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from anabranch import AggregateMethod, AggregateOptions, aggregate_files
from anabranch.bench.machine import Machine
from anabranch.bench.timing import interleave

TENSORS = 12
BUFFER = 8 << 20  # of the copy
COPY = "copy"
HEADER = ("case", "contender", "s", "best", "GB/s", "reads", "time / copy", "peak memory, MB")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesSample:
    """One contender over N files of `bytes` in all. peak: of the process's memory until then."""

    case: str
    contender: str
    seconds: tuple[float, ...]
    bytes: int
    bytes_read: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesReport:
    """A table for `report.to_text` and its like."""

    title: str
    machine: Machine
    samples: tuple[FilesSample, ...]

    @property
    def header(self) -> tuple[str, ...]:
        return HEADER

    def rows(self) -> list[tuple[str, ...]]:
        """One line each; times are compared with the copy of the same case."""
        copies = {sample.case: median(sample.seconds) for sample in self.samples if sample.contender == COPY}
        return [
            (
                sample.case,
                sample.contender,
                f"{median(sample.seconds):.3f}",
                f"{min(sample.seconds):.3f}",
                f"{sample.bytes_read / median(sample.seconds) / 1e9:.2f}",
                f"{sample.bytes_read / sample.bytes:.2f}",
                f"{median(sample.seconds) / copies[sample.case]:.2f}",
                f"{sample.peak / 1e6:.0f}",
            )
            for sample in self.samples
        ]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            f"copy: one thread reads all files by {BUFFER >> 20} MiB and writes the first one again; "
            "all contenders sync what they wrote",
            "cold: the files are dropped from the page cache before each call",
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return asdict(self)


def measure_files(
    N: int, total: int, *, dtype: torch.dtype, repeats: int, cold: bool, folder: Path | None
) -> list[FilesSample]:
    """All contenders over N files of `total` bytes together, which are made for the time being."""
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-", dir=folder) as name:
        paths = _make_files(Path(name), N, total, dtype)
        out, size = Path(name) / "out", sum(path.stat().st_size for path in paths)
        f = N // 5
        contenders: list[tuple[str, Callable[[], int]]] = [(COPY, partial(_copy, paths, out))]
        quick = AggregateOptions(distances=False)
        for title, method, options in (
            ("mean, no distances", AggregateMethod(rule="mean"), quick),
            ("mean", AggregateMethod(rule="mean"), AggregateOptions()),
            ("coordinate-median, no distances", AggregateMethod(rule="coordinate-median"), quick),
            ("krum", AggregateMethod(rule="krum", f=f), AggregateOptions()),
            ("geometric-median", AggregateMethod(), AggregateOptions()),
            ("geometric-median after nnm", AggregateMethod(pre=("nnm",), f=f), AggregateOptions()),
        ):
            contenders.append((title, partial(_aggregate, paths, out, method, options)))
        runs = [partial(_timed, step, paths, out, cold) for _, step in contenders]
        case = f"N={N} {str(dtype).removeprefix('torch.')} {size / 1e9:.1f} GB{' cold' if cold else ''}"
        return [
            FilesSample(
                case=case,
                contender=title,
                seconds=tuple(seconds for seconds, _, _ in results),
                bytes=size,
                bytes_read=results[0][1],
                peak=max(peak for _, _, peak in results),
            )
            for (title, _), results in zip(contenders, interleave(runs, repeats=repeats, warmup=1), strict=True)
        ]


def _make_files(folder: Path, N: int, total: int, dtype: torch.dtype) -> list[Path]:
    random = torch.Generator().manual_seed(N)
    D = max(1, total // (N * dtype.itemsize * TENSORS))
    paths = [folder / f"client-{i:03}.safetensors" for i in range(N)]
    for path in paths:
        save_file({f"layer {t}": torch.randn(D, generator=random).to(dtype) for t in range(TENSORS)}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that wait to be written cannot be dropped
    return paths


def _copy(paths: list[Path], out: Path) -> int:
    buffer, count = memoryview(bytearray(BUFFER)), 0
    with out.open("wb", buffering=0) as to:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    count += n
                    if path == paths[0]:
                        to.write(buffer[:n])
        os.fsync(to.fileno())
    return count


def _aggregate(paths: list[Path], out: Path, method: AggregateMethod, options: AggregateOptions) -> int:
    return aggregate_files(paths, out, method, options).bytes_read


def _timed(step: Callable[[], int], paths: list[Path], out: Path, cold: bool) -> tuple[float, int, int]:
    """Seconds, bytes read and the most memory that the process had until then."""
    out.unlink(missing_ok=True)
    if cold:
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    count = step()
    seconds = time.perf_counter() - start
    return seconds, count, _memory("VmHWM")


def _memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
