"""One forward pass of a scheduled step over the pools of keys and values.

The pools have one K and one V tensor per layer, with head counts and widths of their own. A step's tokens are packed
into one row each; what the ops need to find their pages is built with NumPy, a fixed number of small arrays per step.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Transformer
from anabranch.serve.adapters.arena import AdapterArena
from anabranch.serve.scheduler import S, Step
from anabranch_kernels.memory import prefer_huge_pages
from anabranch_kernels.paged_attention.op import paged_attention, store_kv

if TYPE_CHECKING:
    from anabranch.serve.tensor_parallel import Workers

Integers = NDArray[np.integer]
CACHE_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerCache:
    """k [P, Hk, page, Dk], v [P, Hv, page, Dv]; for int8 also scales [P, H, page] float32, one per token and head."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes one token takes in all layers, the scales of an int8 cache included."""
    scales = 4 * config.layers * (config.k_heads + config.v_heads) if dtype == torch.int8 else 0
    return config.cache_bytes_per_token(dtype.itemsize, dtype.itemsize) + scales


def decode_bytes(model: Transformer, dtype: torch.dtype, context: int) -> int:
    """Bytes that decoding one token after `context` others has to read: all weights once, and the cache it sees.

    Of the embedding only what also serves as the output matrix counts: otherwise one row of it is read. Of a model that
    several ranks share, these are the bytes of this one.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters()) - model.embed.nbytes
    if model.config.tie_embeddings:
        weights += model.embed[: len(model.shard.vocab)].nbytes
    seen = sum(context if window is None else min(window, context) for window in model.config.windows)
    return weights + seen * cache_bytes_per_token(model.config, dtype) // model.config.layers


def make_caches(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Pools of all layers. Nothing is written, so a CPU's pages cost memory only once they are used."""

    def pool(heads: int, width: int) -> tuple[Tensor, Tensor | None]:
        shape = (num_blocks, heads, block_size)
        scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype == torch.int8 else None
        return prefer_huge_pages(torch.empty(*shape, width, dtype=dtype, device=device)), scales

    caches = []
    for _ in range(config.layers):
        k, k_scales = pool(config.k_heads, config.k_dim)
        v, v_scales = pool(config.v_heads, config.v_dim)
        caches.append(LayerCache(k, v, k_scales, v_scales))
    return caches


@dataclass(frozen=True, slots=True)
class PagedAttend:
    """What the model's blocks call in one step: store the new keys and values, then attend over the pages."""

    caches: list[LayerCache]
    slots: Tensor  # [T] int64
    page_table: Tensor  # [B, max_pages] int32
    seq_lens: Tensor  # [B] int32
    cu_seqlens_q: Tensor  # [B + 1] int32

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        cache = self.caches[layer]
        store_kv(k, v, cache.k, cache.v, self.slots, k_scales=cache.k_scales, v_scales=cache.v_scales)
        out = paged_attention(
            q, cache.k, cache.v, self.page_table, self.seq_lens, self.cu_seqlens_q, window=window,
            k_scales=cache.k_scales, v_scales=cache.v_scales,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # no lse was asked for
        return out


class Batch(NamedTuple):
    """The arrays of one step: its tokens in one row each, packed in the order of its sequences."""

    tokens: Integers  # [T] int64
    positions: Integers  # [T] int64
    slots: Integers  # [T] int64
    page_table: Integers  # [B, max_pages] int32
    seq_lens: Integers  # [B] int32
    cu_seqlens_q: Integers  # [B + 1] int32


def compute(model: Transformer, caches: list[LayerCache], batch: Batch) -> Tensor:
    """Hidden states [T, hidden_size] of a step; its keys and values go into the caches. All ranks of a group call."""
    device = model.embed.device
    tokens, positions, slots, page_table, seq_lens, cu_seqlens_q = (_tensor(array, device) for array in batch)
    hidden: Tensor = model(tokens, positions, PagedAttend(caches, slots, page_table, seq_lens, cu_seqlens_q))
    return hidden


def score(model: Transformer, hidden: Tensor, rows: Sequence[int] | Integers) -> Tensor:
    """Scores [len(rows), vocab] float32 of rows of `compute`'s result. All ranks of a group call, rank 0 gets them."""
    if len(rows) < len(hidden):
        hidden = hidden[_tensor(np.array(rows), hidden.device)]
    return model.logits(hidden)


def _tensor(array: Integers, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


class Runner:
    """Holds the model, its caches and the page table of every row the scheduler hands out.

    workers   the other ranks of a model's group, which are told of everything that is computed; None if all is here
    adapters  what the model's layers add for the sequences that have one; None if no sequence ever has

    `model_s` sums the seconds spent in calls of the model. A GPU may still be at work when they return.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_len: int,
        dtype: torch.dtype,
        workers: "Workers | None" = None,
        adapters: AdapterArena | None = None,
    ) -> None:
        self.model = model
        self.workers = workers
        self.adapters = adapters
        self.device = model.embed.device
        self.block_size = block_size
        self.model_s = 0.0
        self.caches = make_caches(model.config, num_blocks, block_size, dtype, self.device)
        self._table = np.zeros((max_num_seqs, -(-max_len // block_size)), np.int32)

    def forward(self, step: Step[S]) -> Tensor:
        """Compute a step's tokens: hidden states [T, hidden_size], packed in the order of its sequences."""
        batch = self._pack(step)
        if self.adapters is not None:
            self._prepare(self.adapters, step)
        before = time.perf_counter()
        with nullcontext() if self.workers is None else self.workers.forward(batch):
            hidden = compute(self.model, self.caches, batch)
        self.model_s += time.perf_counter() - before
        return hidden

    def _prepare(self, adapters: AdapterArena, step: Step[S]) -> None:
        """Put the step's new adapters in place, and say which token has which."""
        for load in step.loads:
            adapters.load(load)
        adapters.adapter_of = None
        if any(slot >= 0 for slot in step.slots):
            slots = np.array(step.slots, np.int32)
            adapters.adapter_of = _tensor(slots.repeat(step.counts), self.device)

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores [len(rows), vocab] float32 of some rows of the latest `forward`: only those are computed."""
        before = time.perf_counter()
        with nullcontext() if self.workers is None else self.workers.logits(np.array(rows)):
            scores = score(self.model, hidden, rows)
        self.model_s += time.perf_counter() - before
        return scores

    def _pack(self, step: Step[S]) -> Batch:
        for row, first, blocks in step.placed:
            self._table[row, first : first + len(blocks)] = blocks
        rows, starts, counts = (np.array(values) for values in (step.rows, step.starts, step.counts))
        ends, lens = counts.cumsum(), starts + counts
        cu_seqlens_q = np.zeros(len(rows) + 1, np.int32)
        cu_seqlens_q[1:] = ends
        T = int(ends[-1])
        owners, positions = rows, starts
        if len(rows) < T:  # not every sequence has exactly one new token
            owners = rows.repeat(counts)
            positions = (lens - ends).repeat(counts) + np.arange(T)
        pages, offsets = np.divmod(positions, self.block_size)
        slots = self._table[owners, pages].astype(np.int64) * self.block_size + offsets
        page_table = self._table[rows, : -(-int(lens.max()) // self.block_size)]
        tokens: list[int] = []
        for seq, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            tokens += seq.tokens[start : start + count]
        return Batch(np.array(tokens), positions, slots, page_table, lens.astype(np.int32), cu_seqlens_q)
