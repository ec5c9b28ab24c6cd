"""Types of the optional CUDA extension (bindings/cuda/module.cpp)."""

source_hash: str

def store_kv(
    k: tuple[int, ...],
    v: tuple[int, ...],
    k_cache: tuple[int, ...],
    v_cache: tuple[int, ...],
    k_scales: int,
    v_scales: int,
    slots: int,
    sizes: tuple[int, ...],
    stream: int,
) -> None: ...
