"""The adapters of a model that is about to be served: read them, and take the memory in which they run."""

from collections.abc import Mapping
from pathlib import Path

from anabranch.adapters.attach import linear_layers
from anabranch.models.transformer import Transformer
from anabranch.serve.adapters.arena import AdapterArena, bytes_per_rank
from anabranch.serve.adapters.library import AdapterLibrary
from anabranch.serve.memory import free_bytes

FREE_SHARE = 0.1  # of the free memory
USEFUL_RANKS = 16_384  # 256 adapters of rank 64
FILE_BYTES = 4  # for each byte on the device: float32 files for a bfloat16 model, and rows that are not alive


def open_adapters(
    model: Transformer, folders: Mapping[str, str | Path], *, device_bytes: int | None, host_bytes: int
) -> tuple[AdapterLibrary, AdapterArena]:
    """Load the adapters that are known at the start, and give the model room for them and others.

    device_bytes  of the adapters that run, on the model's device; None: a tenth of what is free, but no more than 256
                  adapters of rank 64 need, and no less than the largest of these
    host_bytes    of the adapters that are kept in memory beside

    Raises ValueError for folders that cannot be served, and for the largest that device_bytes cannot hold.
    """
    places = linear_layers(model)
    library = AdapterLibrary(places, host_bytes=host_bytes)
    largest, ranks = "", 1
    for name, folder in folders.items():
        loaded = library.open(library.load(name, folder))
        if loaded.ranks > ranks:
            largest, ranks = name, loaded.ranks
    rank_bytes = bytes_per_rank(places)
    if device_bytes is None:
        room = max(ranks, min(USEFUL_RANKS, int(free_bytes(model.embed.device) * FREE_SHARE) // rank_bytes))
    else:
        room = device_bytes // rank_bytes
        if room < ranks:
            whose = f"; adapter {largest!r} has {ranks}, which take {ranks * rank_bytes} bytes" if largest else ""
            raise ValueError(
                f"adapter_bytes={device_bytes} hold {room} ranks of {rank_bytes} bytes in this model{whose}"
            )
    library.limit(ranks=room, file_bytes=FILE_BYTES * room * rank_bytes)
    return library, AdapterArena(model, places, ranks=room)
