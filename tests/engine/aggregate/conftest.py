"""Clients of some tensors each, in memory and as files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Clients = list[dict[str, Tensor]]


def clients_of(N: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Clients:
    """N clients around a common model: a matrix, a vector, a number, an empty tensor, a counter and a mask."""
    random = torch.Generator().manual_seed(seed)
    middle = {"matrix": torch.randn(37, 59, generator=random), "vector": torch.randn(1100, generator=random) * 3}
    middle["number"] = torch.randn((), generator=random)

    def client(i: int) -> dict[str, Tensor]:
        floats = {name: (x + 0.1 * torch.randn(x.shape, generator=random)).to(dtype) for name, x in middle.items()}
        mask = torch.rand(5, generator=random) > 0.5
        return {**floats, "empty": torch.zeros(0, 4, dtype=dtype), "steps": torch.tensor([i, 7 * i % 5]), "mask": mask}

    return [client(i) for i in range(N)]


@pytest.fixture
def make_clients() -> Callable[..., Clients]:
    return clients_of


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., list[Path]]:
    """`save(clients)`: one file each."""

    def write(clients: Sequence[Mapping[str, Tensor]], name: str = "client") -> list[Path]:
        paths = [tmp_path / f"{name}-{i:02}.safetensors" for i in range(len(clients))]
        for path, tensors in zip(paths, clients, strict=True):
            save_file(dict(tensors), path, metadata={"format": "pt", "round": "3"})
        return paths

    return write
