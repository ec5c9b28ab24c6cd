# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Real numbers to elements and back, and elements out of a stream of bytes, on a GPU: one thread per number.

Bound    memory: every number read once and written once; words of a stream are read twice.
Numerics the reference's to the last bit. Numbers are float64 on the way and at most (p - 1) / 2 as integers; adding and
         taking away 2^52 rounds to the nearest, half to even. `clip` and the like come as the bits of a float64: Triton
         would hand them over in float32.
Grid     counts go to one place per block and are added up by torch: no atomics. Accepted words keep their order: each
         block knows where its own begin from the counts of those before it, which takes a second launch and tells the
         host how many there are.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .fields import FIELDS, Field

BLOCK = 1024


def plan(field: Field) -> Plan:
    return Plan(constants={"P": field.p, "BLOCK": BLOCK}, num_warps=4, num_stages=1)


@triton.jit
def quantise_kernel(x, dither, out, counts, n, clip, scale, P: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    value = tl.load(x + i, mask=there, other=0.0).to(tl.float64)
    most = clip.to(tl.int64).to(tl.float64, bitcast=True)
    size = tl.abs(value)
    finite = size < float("inf")  # NaN is not
    tl.store(counts + tl.program_id(0) * 2, tl.sum((size > most).to(tl.int32), 0))
    tl.store(counts + tl.program_id(0) * 2 + 1, tl.sum((~finite).to(tl.int32), 0))
    size = tl.where(size > most, most, tl.where(finite, size, 0.0)) * scale.to(tl.int64).to(tl.float64, bitcast=True)
    if dither is None:
        # From 2^52 on all numbers are whole.
        whole = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
        number = whole.to(tl.int64)
        number = tl.where(value < 0.0, -number, number)
    else:
        shifted = tl.where(value < 0.0, -size, size) + tl.load(dither + i, mask=there, other=0.0)
        number = tl.floor(shifted).to(tl.int64)
    element = number.to(tl.uint64)
    element = tl.where(number < 0, element + P, element)
    tl.store(out + i, element.to(out.dtype.element_ty), mask=there)


@triton.jit
def dequantise_kernel(x, out, n, divisor, P: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = tl.load(x + i, mask=i < n, other=0).to(tl.uint64)
    number = tl.where(element > P // 2, element - P, element).to(tl.int64)
    tl.store(out + i, number.to(tl.float64) / divisor.to(tl.int64).to(tl.float64, bitcast=True), mask=i < n)


@triton.jit
def _accepted(x, i, n, P: tl.constexpr, MASK: tl.constexpr):
    word = tl.load(x + i, mask=i < n, other=-1).to(tl.uint64) & MASK
    return word, (word < P) & (i < n)


@triton.jit
def count_kernel(x, counts, n, P: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _word, good = _accepted(x, i, n, P, MASK)
    tl.store(counts + tl.program_id(0), tl.sum(good.to(tl.int32), 0))


@triton.jit
def accept_kernel(x, begins, out, n, P: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word, good = _accepted(x, i, n, P, MASK)
    place = tl.load(begins + tl.program_id(0)) + tl.cumsum(good.to(tl.int32), 0) - 1
    tl.store(out + place, word.to(out.dtype.element_ty), mask=good)


def quantise(x: Tensor, dither: Tensor | None, field: str, clip: float, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """Elements, and the counts [2] of clipped numbers and of such that are not finite."""
    n, chosen = x.numel(), plan(FIELDS[field])
    out = torch.empty(x.shape, dtype=FIELDS[field].dtype, device=x.device)
    counts = torch.empty(triton.cdiv(n, BLOCK), 2, dtype=torch.int64, device=x.device)
    if n:
        quantise_kernel[len(counts),](
            x.contiguous(), dither if dither is None else dither.contiguous(), out, counts, n,
            _bits(clip), _bits(2.0**fraction_bits),
            **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return out, counts.sum(0)


def dequantise(x: Tensor, field: str, divisor: float) -> Tensor:
    n, chosen = x.numel(), plan(FIELDS[field])
    out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if n:
        dequantise_kernel[triton.cdiv(n, BLOCK),](
            x.contiguous(), out, n, _bits(divisor),
            **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return out


def accept(stream: Tensor, field: str) -> Tensor:
    f = FIELDS[field]
    n, chosen = stream.numel() // f.bytes, accept_plan(f)
    if n == 0:
        return torch.empty(0, dtype=f.dtype, device=stream.device)
    aligned = stream.is_contiguous() and (stream.storage_offset() | stream.data_ptr()) % f.bytes == 0
    words = (stream if aligned else stream.clone(memory_format=torch.contiguous_format)).view(f.dtype)
    counts = torch.empty(triton.cdiv(n, BLOCK), dtype=torch.int64, device=stream.device)
    how = {**chosen.constants, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    count_kernel[len(counts),](words, counts, n, **how)
    ends = counts.cumsum(0)
    out = torch.empty(int(ends[-1]), dtype=f.dtype, device=stream.device)
    accept_kernel[len(counts),](words, ends - counts, out, n, **how)
    return out


def accept_plan(field: Field) -> Plan:
    """Of count_kernel and accept_kernel."""
    constants = {"P": field.p, "MASK": (1 << field.bits) - 1, "BLOCK": BLOCK}
    return Plan(constants=constants, num_warps=4, num_stages=1)


def _bits(value: float) -> int:
    """Of a float64, as an integer."""
    return int.from_bytes(struct.pack("<d", value), "little")
