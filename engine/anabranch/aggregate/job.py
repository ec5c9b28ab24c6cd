"""Aggregation as a whole: of tensors in memory, of parts of them in several processes, of files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from anabranch.aggregate.files import SafetensorsFiles
from anabranch.aggregate.report import Report
from anabranch.aggregate.settings import AggregateMethod, AggregateOptions
from anabranch.aggregate.sources import NamedTensors, Sharded, Source
from anabranch.aggregate.sweep import Progress, aggregate_source
from anabranch.common.files import replace_file
from anabranch.common.tensor_file import tensor_writer


def aggregate_tensors(
    clients: Sequence[Mapping[str, Tensor]],
    method: AggregateMethod,
    options: AggregateOptions | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """One mapping of tensors from N, and what is known about it.

    clients   of the same names, shapes and dtypes
    base      what they are differences from: the last global model; zero if None
    group     of processes that each hold a part of every tensor, along any dimension, and get that part of the result.
              All make this call; coefficients come from one sum of the parts' products

    Raises ValueError for clients or options that do not fit each other, and for clients that are not finite.
    """
    source: Source = NamedTensors(clients, base)
    if group is not None:
        source = Sharded(source, group)
    results = {name: x.new_empty(x.shape) for name, x in clients[0].items()}
    flat = {name: x.view(-1) for name, x in results.items()}

    def write(name: str, begin: int, values: Tensor) -> None:
        flat[name][begin : begin + len(values)] = values

    return results, aggregate_source(source, method, write, options or AggregateOptions())


def aggregate_files(
    clients: Sequence[str | Path],
    out: str | Path,
    method: AggregateMethod,
    options: AggregateOptions | None = None,
    *,
    base: str | Path | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """One safetensors file from N clients' files or checkpoint folders, of any size: four tiles stay in memory.

    out       appears whole or not at all; may be no file that is read
    base      file or folder of the last global model
    progress  called after each tile with the name of the sweep, the bytes read in it and those it will read; what it
              raises ends the work

    Raises FileNotFoundError, and ValueError as `aggregate_tensors`, naming the file and what is wrong with it.
    """
    source = SafetensorsFiles([Path(client) for client in clients], None if base is None else Path(base))
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; the result is one file")
    if out.resolve() in source.paths:
        raise ValueError(f"{out} is one of the files to read; choose another for the result")
    reports = []

    def fill(temporary: Path) -> None:
        tensors = {entry.name: (entry.dtype, entry.shape) for entry in source.entries}
        with tensor_writer(temporary, tensors, {**source.metadata, "format": "pt"}) as write:
            reports.append(aggregate_source(source, method, write, options or AggregateOptions(), progress))

    replace_file(out, fill)
    return reports[0]
