# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Matrix products modulo p on the tensor cores of a GPU: integers as digits to the base 256, exact int32 sums.

The words of x are their own digits: D = 4 bytes of an int32 element, 8 of an int64 one. The matrix is prepared, once
and in a launch of its own, so that only D sums are left per output, not 2 D - 1 diagonals:

    G_mu x_ul = sum_b (256^b G_mu mod p) byte_b(x_ul)        256^b G_mu mod p = sum_a 256^a digit_ab,  digit in int8
    out_ml = sum_a 256^a (sum_{u,b} digit_ab[m, u] (byte_b(x_ul) - 128)) + 128 sum_{u,b} 256^b G_mu

One product of int8 matrices [64, D U] x [D U, D M] makes a tile of 64 columns; `byte - 128` is one exclusive or of the
word, with which it lies in the registers as the tensor cores want it. 31-bit primes carry a factor 2^32 in the matrix,
which the Montgomery reduction at the end takes away.

Layout   x [U, L] row-major, L in groups of ALIGN elements. Up to 512 bytes of a column (U <= 128, for int64 64) the
         digits of a tile of rows stay in shared memory while a program walks over blocks of columns
         (resident_kernel); longer columns are walked in steps, with the digits from L2 (streaming_kernel).
Numerics exact: |sum| <= D U 2^14 <= 2^30 up to U = MOST; gpu.multiply cuts longer sums.
Bound    memory up to about N = 128. Counted for N = 64, U = 48, 3.125e6 columns (l = 1e8 in K = 32 blocks), on data
         sheets of an H100 (3.35 TB/s, 990 T int8 multiply-adds/s, 132 x 64 wide multiplies a clock of 1.755 GHz):
           memory          4 (U + N) L = 1.4 GB                                        0.42 ms
           tensor cores    16 N U L = 154 G multiply-adds, 205 G with U padded to 64   0.21 ms
           reductions      about 11 instructions for each of N L outputs               0.1 ms
         One wide multiply-add per product instead (IMAD.WIDE, half the rate of IMAD), with a fold every fourth, takes
         N U L = 9.6 G of them: 0.65 ms at full rate, 1.3 ms at half; so it is left out here, for M = 1 too: rows are
         padded to 16 and the tensor cores still outrun memory fourfold. For sums over a long U there is gpu_project.
         Transforms instead, 384 butterflies of about 9 instructions a column, would take 0.4 ms of all ALUs; at
         N = 128 (896) they are slower than 16 N U multiply-adds of the tensor cores, at 256 no more than 1.25 times
         faster on paper. So on a GPU this product is how shares are encoded.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan
from .fields import Field
from .gpu_arithmetic import add, from_halves, times_256

MOST = 1 << 13  # terms of a sum
RESIDENT = 512  # bytes of a column up to which the digits stay in shared memory
RESIDENTS = 2  # programs of resident_kernel that share a multiprocessor
FEW = 16  # rows of the narrowest tile


@cache
def plan(M: int, U: int, align: int, field: Field) -> Plan:
    """Of resident_kernel if a column has at most RESIDENT bytes, else of streaming_kernel."""
    D = field.bytes
    resident = D * U <= RESIDENT
    column = max(64, triton.next_power_of_2(D * U)) if resident else 128
    # 256 sums a column and 128 registers for them; half of it where the operands or addresses need more.
    sums = 256 if column <= 256 and align > 1 and resident else 128
    constants = {
        "P": field.p, "INVERSE": pow(field.p, -1, 2**32) if D == 4 else 0, "D": D,
        "BM": FEW if M <= FEW else sums // D, "BU": column // D, "BL": 64, "ALIGN": align,
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=1 if resident else 3)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; interpreted, three, so that programs have more than one block each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def digits_plan(BM: int, field: Field) -> Plan:
    p = field.p
    # 31-bit primes: Montgomery's factor goes out again. `_finished` adds the bias to stay positive.
    factor, bias = (128 * pow(2**32, -1, p) % p, 1 << 23) if field.bytes == 4 else (128, 1 << 58)
    constants = {"P": p, "D": field.bytes, "BM": BM, "FACTOR": factor, "OFFSET": -bias % p, "ROWS": 16, "BLOCK": 32}
    return Plan(constants=constants, num_warps=4, num_stages=1)


@triton.jit
def digits_kernel(
    matrix, digits, offsets, M, U, K, matrix_row, matrix_column,
    P: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, FACTOR: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digits [(tile, a, m in tile), (u, b)] of the K columns of some rows, and the constant of their outputs."""
    CENTRE: tl.constexpr = 0x8080808080808080 if D == 8 else 0x80808080
    LARGEST: tl.constexpr = 0x7F7F7F7F7F7F7F7F if D == 8 else 0x7F7F7F7F  # that D digits of -128..127 can hold
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    target = digits + ((m // BM * D * BM + m % BM) * K)[:, None]
    lows = tl.zeros([ROWS, BLOCK], tl.uint64)
    highs = tl.zeros([ROWS, BLOCK], tl.uint64)
    for start in range(0, K // D, BLOCK):
        u = start + tl.arange(0, BLOCK).to(tl.int64)[None, :]
        inside = (m < M)[:, None] & (u < U)
        term = tl.load(matrix + m[:, None] * matrix_row + u * matrix_column, mask=inside, other=0).to(tl.uint64)
        if D == 4:
            term = (term << 32) % P
        for b in tl.static_range(D):
            lows += term & 4294967295
            highs += term >> 32
            centred = tl.where(term > LARGEST, term - P, term) + CENTRE
            for a in tl.static_range(D):
                digit = (centred >> (8 * a)).to(tl.uint8) ^ 128
                tl.store(target + a * BM * K + u * D + b, digit.to(tl.int8, bitcast=True), mask=u * D < K)
            term = times_256(term, P)
    offset = from_halves(tl.sum(lows, 1), tl.sum(highs, 1), P)
    if D == 4:
        offset = offset * FACTOR % P
    else:
        for _ in tl.static_range(7):
            offset = add(offset, offset, P)
    tl.store(offsets + m, add(offset, tl.zeros_like(offset) + OFFSET, P).to(offsets.dtype.element_ty))


@triton.jit
def _bytes(words, D: tl.constexpr, BU: tl.constexpr, BL: tl.constexpr):
    """The bytes, less 128, of words [BU, BL] as a left operand [BL, BU D]."""
    if D == 8:
        words = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32)).permute(0, 2, 1).reshape(2 * BU, BL)
    words = words ^ -2139062144  # 0x80 in each byte
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.join(even, odd).permute(1, 0, 2, 3).reshape(BL, BU * D)


@triton.jit
def _sum_of_four(sums, SHORT: tl.constexpr):
    """sum_a 256^a sums[..., a] as int64; SHORT: the sums of two pairs fit int32."""
    even, odd = tl.split(sums)
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    if not SHORT:
        a0, a1, a2, a3 = a0.to(tl.int64), a1.to(tl.int64), a2.to(tl.int64), a3.to(tl.int64)
    return (a0 + a1 * 256).to(tl.int64) + (a2 + a3 * 256).to(tl.int64) * 65536


@triton.jit
def _finished(
    sums, offset, P: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """Elements [BL, BM] of the sums [BL, (a, m)]; `offset` takes back what keeps numbers positive here."""
    if D == 4:
        total = _sum_of_four(sums.reshape(BL, 4, BM).permute(0, 2, 1).reshape(BL, BM, 2, 2), SHORT)
        quotient = total.to(tl.uint32) * INVERSE
        high = (total >> 32).to(tl.uint32) + 8388608
        out = high - tl.umulhi(quotient, tl.zeros_like(quotient) + P)  # of -P + 1..2^24
        out = tl.minimum(out, out + P) + (offset.to(tl.uint32) - P)
        return tl.minimum(out, out + P).to(tl.int32)
    else:
        low, high = tl.split(sums.reshape(BL, 2, 4, BM).permute(0, 3, 2, 1))
        low = _sum_of_four(low.reshape(BL, BM, 2, 2), SHORT)
        high = _sum_of_four(high.reshape(BL, BM, 2, 2), SHORT)
        if P > 2**63:  # Goldilocks: 2^64 = 2^32 - 1
            rest = (low + (high >> 32) * 4294967295 + 288230376151711744).to(tl.uint64)
            out = rest + (high.to(tl.uint64) << 32)
            out = tl.where(out < rest, out + 4294967295, out)
        else:  # 2^50 = 27
            rest = (low + (high >> 18) * 27 + 288230376151711744).to(tl.uint64)
            out = rest + ((high & 262143).to(tl.uint64) << 32)
            out = (out & 1125899906842623) + (out >> 50) * 27
        out = tl.where(out >= P, out - P, out)
        return add(out, offset.to(tl.uint64), P).to(tl.int64)


@triton.jit
def _columns(x, u, c, U, L, x_row):
    """Words [BU, BL] of columns c; zeros where there are none."""
    return tl.load(x + u[:, None].to(tl.int64) * x_row + c, mask=(u < U)[:, None] & (c < L), other=0)


@triton.jit
def resident_kernel(
    digits, offsets, x, out, M, U, L, x_row, P: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = D * BU
    L, x_row = L * ALIGN, x_row * ALIGN
    tile = tl.program_id(1)
    rows = digits + (tile * D * BM + tl.arange(0, D * BM))[:, None].to(tl.int64) * K
    matrix = tl.trans(tl.load(rows + tl.arange(0, K)))
    m, u = tile * BM + tl.arange(0, BM), tl.arange(0, BU)
    offset = tl.load(offsets + m)
    for block in range(tl.program_id(0), tl.cdiv(L, BL), tl.num_programs(0)):
        c = block * BL + tl.arange(0, BL)
        words = _columns(x, u, c, U, L, x_row)
        sums = tl.dot(_bytes(words, D, BU, BL), matrix, out_dtype=tl.int32)
        result = _finished(sums, offset, P, INVERSE, D, BM, BL, SHORT=K <= 256)
        tl.store(out + m[None, :].to(tl.int64) * L + c[:, None], result, mask=(m < M)[None, :] & (c < L)[:, None])


@triton.jit
def streaming_kernel(
    digits, offsets, x, out, M, U, L, K, x_row, P: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    L, x_row, K = L * ALIGN, x_row * ALIGN, K * D * BU
    tiles = tl.cdiv(M, BM)
    tile = tl.program_id(0) % tiles  # neighbours share columns
    rows = digits + (tile * D * BM + tl.arange(0, D * BM))[:, None].to(tl.int64) * K
    c = tl.program_id(0) // tiles * BL + tl.arange(0, BL)
    sums = tl.zeros([BL, D * BM], tl.int32)
    for start in range(0, U, BU):
        words = _columns(x, start + tl.arange(0, BU), c, U, L, x_row)
        matrix = tl.trans(tl.load(rows + (start * D + tl.arange(0, D * BU))))
        sums = tl.dot(_bytes(words, D, BU, BL), matrix, sums)
    m = tile * BM + tl.arange(0, BM)
    result = _finished(sums, tl.load(offsets + m), P, INVERSE, D, BM, BL, SHORT=False)
    tl.store(out + m[None, :].to(tl.int64) * L + c[:, None], result, mask=(m < M)[None, :] & (c < L)[:, None])


def multiply(matrix: Tensor, x: Tensor, field: Field) -> Tensor:
    """[M, U] x [U, L] of at most MOST terms."""
    (M, U), L = matrix.shape, x.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    align = 16 // field.bytes
    if L % align or x.stride(0) % align or x.data_ptr() % 16:
        align = 1
    chosen = plan(M, U, align, field)
    BM, BU, BL = (chosen.constants[name] for name in ("BM", "BU", "BL"))
    tiles, chunks, blocks = triton.cdiv(M, BM), triton.cdiv(U, BU), triton.cdiv(L, BL)
    K = chunks * BU * field.bytes
    digits = torch.empty(tiles * field.bytes * BM, K, dtype=torch.int8, device=x.device)
    offsets = torch.empty(tiles * BM, dtype=field.dtype, device=x.device)
    first = digits_plan(BM, field)
    digits_kernel[tiles * BM // 16,](
        matrix, digits, offsets, M, U, K, *matrix.stride(),
        **first.constants, num_warps=first.num_warps, num_stages=first.num_stages,
    )  # fmt: skip
    out = x.new_empty(M, L)
    arguments = digits, offsets, x, out, M, U, L // align
    how = {**chosen.constants, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    if field.bytes * U <= RESIDENT:
        programs = max(1, multiprocessors(x.device) * RESIDENTS // tiles)
        resident_kernel[min(blocks, programs), tiles](*arguments, x.stride(0) // align, **how)
    else:
        streaming_kernel[tiles * blocks,](*arguments, chunks, x.stride(0) // align, **how)
    return out
