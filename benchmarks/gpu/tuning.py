"""Launches of the decode, prefill and Gram kernels with other tiles than the shipped ones, on shapes that matter."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anabranch_kernels.geometric_median import gpu as gpu_median
from anabranch_kernels.launch import Plan
from anabranch_kernels.paged_attention import gpu_decode, gpu_prefill
from anabranch_kernels.paged_attention.gpu_pages import EVERYTHING

PAGE = 64
HEADS, FEW_HEADS = (32, 4, 16), (2, 1, 2)


def describe(plan: Plan) -> dict[str, int | None]:
    tiles = {
        name: plan.constants[name]
        for name in ("BLOCK_M", "BLOCK_N", "MIN_SPLIT", "PAGE", "ROWS", "TILE")
        if name in plan.constants
    }
    return {**tiles, "num_warps": plan.num_warps, "num_stages": plan.num_stages, "max_registers": plan.max_registers}


def problems(part: str, device: torch.device, *, dry: bool) -> Iterator[tuple[str, list[Plan], Callable[[Plan], None]]]:
    """(label, plans with the shipped one first, launch) for each problem of a part; tiny ones on a CPU when dry."""
    query = torch.float32 if dry else torch.bfloat16
    widths = (16,) if dry else (64, 128)
    if part == "tune-decode":
        for width, cache in itertools.product(widths, (query, torch.int8)):
            yield decode_problem(device, width, query, cache, *((1, 20) if dry else (32, 8192)))
    elif part == "tune-gram":
        for N, dtype in itertools.product((8, 32, 64, 128), (torch.float32, torch.bfloat16)):
            yield gram_problem(device, 3 if dry else N, 100 if dry else (1 << 30) // N, dtype)
    else:
        for width in widths:
            yield prefill_problem(device, width, query, 20 if dry else 8192)


def decode_problem(
    device: torch.device, width: int, query: torch.dtype, cache: torch.dtype, B: int, context: int
) -> tuple[str, list[Plan], Callable[[Plan], None]]:
    inputs, results, heads = _tensors(device, width, query, cache, [context] * B, [1] * B)
    shipped = gpu_decode.plan(*heads, width, width, PAGE, query, cache, cache, B, pack=0)
    plans = [shipped]
    for block, stages, warps in itertools.product((16, 32, 64, 128), (2, 3, 4), (4, 8)):
        in_flight = block * cache.itemsize * width * (1 + heads[2] // heads[1]) * (stages - 1)
        if 16 * 1024 <= in_flight <= 100 * 1024:  # of one program; two share a multiprocessor
            constants = shipped.constants | {"BLOCK_N": block, "MIN_SPLIT": 4 * block}
            registers = min(255, 65536 // (gpu_decode.PROGRAMS_PER_SM * 32 * warps))
            plans.append(
                replace(shipped, constants=constants, num_stages=stages, num_warps=warps, max_registers=registers)
            )
    label = f"decode d={width} {cache} B={B} t={context}"
    return label, plans, lambda plan: gpu_decode.decode(*inputs, *results, longest=None, tuned=plan)


def prefill_problem(
    device: torch.device, width: int, dtype: torch.dtype, tokens: int
) -> tuple[str, list[Plan], Callable[[Plan], None]]:
    inputs, results, heads = _tensors(device, width, dtype, dtype, [tokens], [tokens])
    shipped = gpu_prefill.plan(*heads, width, width, PAGE, dtype, dtype, dtype, 1, windowed=False)
    plans = [shipped]
    for rows, block, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        constants = shipped.constants | {"BLOCK_M": rows, "BLOCK_N": block, "BQ": rows // shipped.constants["G"]}
        plans.append(replace(shipped, constants=constants, num_warps=warps, num_stages=stages))
    label = f"prefill d={width} T={tokens}"
    return label, plans, lambda plan: gpu_prefill.prefill(*inputs, *results, shortest=1, tuned=plan)


def gram_problem(
    device: torch.device, N: int, D: int, dtype: torch.dtype
) -> tuple[str, list[Plan], Callable[[Plan], None]]:
    points = torch.randn(1, N, D, device=device, dtype=dtype)
    shipped = gpu_median.gram_plan(N, scaled=False)
    plans = [shipped]
    for tile, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 4)):
        if shipped.constants["ROWS"] * tile <= 4096 * warps:  # numbers that a warp must hold
            constants = shipped.constants | {"TILE": tile}
            plans.append(replace(shipped, constants=constants, num_warps=warps, num_stages=stages))

    def launch(plan: Plan) -> None:
        gpu_median.centred_gram(points, points[:, 0], plan)

    return f"gram N={N} D={D} {dtype}", plans, launch


def _tensors(
    device: torch.device, width: int, query: torch.dtype, cache: torch.dtype, lens: list[int], new: list[int]
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor], tuple[int, int, int]]:
    """Arguments of a launcher, its results, the head counts."""
    Hq, Hk, Hv = heads = HEADS if device.type == "cuda" else FEW_HEADS
    pages = -(-max(lens) // PAGE)
    P = len(lens) * pages
    caches = [torch.randn(P, H, PAGE, width, device=device) for H in (Hk, Hv)]
    scales: list[Tensor | None] = [None, None]
    if cache == torch.int8:
        caches = [(x * 40).clamp(-127, 127) for x in caches]
        scales = [torch.full(x.shape[:3], 1 / 40, device=device) for x in caches]
    q = torch.randn(sum(new), Hq, width, device=device, dtype=query)
    table = torch.randperm(P, device=device).view(len(lens), pages).int()
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device=device)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    inputs = q, *(x.to(cache) for x in caches), table, seq_lens, starts, *scales, width**-0.5, EVERYTHING
    results = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    return inputs, results, heads
