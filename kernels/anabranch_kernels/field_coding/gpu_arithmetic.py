# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Arithmetic of the fields inside Triton kernels: sums and shifts modulo p of unsigned 64-bit integers, slow but plain.

The kernels keep what they repeat per element cheap; these finish a sum that a program has gathered.
"""

import triton
import triton.language as tl


@triton.jit
def add(a, b, P: tl.constexpr):
    """(a + b) mod P of a, b < P."""
    total = a + b
    return tl.where((total < a) | (total >= P), total - P, total)


@triton.jit
def times_2_to_32(a, P: tl.constexpr):
    """a 2^32 mod P of a < P."""
    if P > 2**63:  # Goldilocks: 2^64 = 2^32 - 1, and both terms are below P
        return add((a >> 32) * 4294967295, a << 32, P)
    if P > 2**32:
        return (((((a << 14) % P) << 14) % P) << 4) % P
    return (a << 32) % P


@triton.jit
def times_256(a, P: tl.constexpr):
    """256 a mod P of a < P."""
    if P > 2**63:
        low = a << 8
        return add(tl.where(low >= P, low - P, low), (a >> 56) * 4294967295, P)
    return (a << 8) % P


@triton.jit
def from_halves(low, high, P: tl.constexpr):
    """(low + 2^32 high) mod P of any two unsigned 64-bit integers."""
    return add(times_2_to_32(high % P, P), low % P, P)
