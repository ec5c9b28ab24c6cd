"""How much memory the cache may take, and what that comes to in blocks."""

import os
from pathlib import Path

import torch

from anabranch.models.config import ModelConfig
from anabranch.models.shard import cut
from anabranch.serve.runner import cache_bytes_per_token

FREE_SHARE = {"cpu": 0.5, "cuda": 0.85}  # of the free memory; the rest is for activations and for others
GROUP = Path("/sys/fs/cgroup")  # of this process, as a container sees it
UNLIMITED = 1 << 62


def size_cache(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    cache_bytes: int | None,
    device: torch.device,
    ranks: int = 1,
) -> tuple[int, int]:
    """(number of blocks, max_model_len) of an engine, the same on each of the `ranks` that share the model.

    Every rank holds the keys and values of its own heads in as many blocks; `cache_bytes` is for each of them.

    A length that was not asked for gives way to a small cache; ValueError if one that was does not fit, or is more than
    the model's positions.
    """
    if block_size < 1 or max_num_seqs < 1:
        raise ValueError(f"block_size and max_num_seqs must be at least 1, got {block_size} and {max_num_seqs}")
    if max_model_len is not None and not 2 <= max_model_len <= config.max_position:
        raise ValueError(f"max_model_len must be in [2, {config.max_position}] for this model, got {max_model_len}")
    parts = [cut(config, rank, ranks).config for rank in range(ranks)]
    block_bytes = block_size * max(cache_bytes_per_token(part, dtype) for part in parts)
    budget = cache_budget(device, ranks) if cache_bytes is None else cache_bytes
    length = max_model_len or config.max_position
    useful = max_num_seqs * -(-length // block_size)
    num_blocks = min(budget // block_bytes, useful)
    least = 2 if max_model_len is None else max_model_len
    if num_blocks * block_size < least:
        raise ValueError(
            f"{budget} bytes of cache hold {num_blocks} blocks of {block_size} tokens at {block_bytes} bytes each; one "
            f"sequence of {least} tokens needs {-(-least // block_size)}: raise cache_bytes or lower max_model_len"
        )
    return num_blocks, min(length, num_blocks * block_size)


def cache_budget(device: torch.device, ranks: int = 1) -> int:
    """Bytes that one rank's cache may take of what is free now; ranks on a CPU share one memory."""
    return int(free_bytes(device) * FREE_SHARE.get(device.type, 0.5)) // (ranks if device.type == "cpu" else 1)


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken now: on the CPU what the system, and its control group if there is one, still grant."""
    if device.type != "cpu":
        free, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free)
    return min(_system_bytes(), _group_bytes(GROUP))


def _system_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # other systems do not say what is free


def _group_bytes(group: Path) -> int:
    """What a container's limit leaves (cgroup v2); no limit counts as a very large one."""
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
    except OSError:
        return UNLIMITED
    return UNLIMITED if limit.strip() == "max" else max(0, int(limit) - int(used))
