# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the paged kernels share: sequences out of a packed batch, pages out of a table, types of a product.

Nothing here trusts an index that came from the device: starts are clamped to the packed tokens, page numbers and
table positions are checked before they become addresses. A token whose page does not exist is not read; its score is
NaN, so the rows that should have seen it come out as NaN.
"""

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
EVERYTHING = 1 << 30  # a window no sequence reaches


def dot_type(query: torch.dtype, cache: torch.dtype, *, scaled: bool) -> tl.dtype:
    """Operand type of a product with a cache.

    A 16-bit query meets a cache of its own type in that type; int8 fits every type exactly. Probabilities times the
    scales of an int8 V (`scaled`) may be tiny, where float16 loses bits, so those meet in bfloat16. What is left mixes
    types and is done in float32.
    """
    if torch.float32 in (query, cache):
        return tl.float32
    if cache == torch.int8:
        wanted = torch.bfloat16 if scaled else query
    elif query == cache or scaled:
        wanted = cache
    else:
        return tl.float32
    if triton.knobs.runtime.interpret and wanted == torch.bfloat16:
        return tl.float32  # the interpreter has no product of bfloat16
    return tl.bfloat16 if wanted == torch.bfloat16 else tl.float16


def element_weight(query: torch.dtype, cache: torch.dtype, *, scaled: bool) -> float:
    """Registers that one cached element takes, 1 for 16 bits: one that is converted lives twice."""
    width = 4 if dot_type(query, cache, scaled=scaled) == tl.float32 else 2
    return (width + (cache.itemsize if cache.itemsize != width else 0)) / 2


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def block_of_sequences(B: int) -> int:
    """Sequences that a program looks through at once; few sizes, as each is a compilation."""
    return 16 if B <= 16 else 128 if B <= 128 else max(1024, triton.next_power_of_2(B))


@triton.jit
def sequence_bounds(cu_seqlens_q, seq_lens, b, B, T, table_tokens):
    """First packed row, number of new rows and cached length of sequences b (a number or a block of numbers).

    A length over the table is cut to where every new row still lies past the table: none of them finds its page.
    """
    there = (b >= 0) & (b < B)
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + b, mask=there, other=0), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + b + 1, mask=there, other=0), 0), T)
    n = tl.maximum(end - first, 0)
    length = tl.load(seq_lens + b, mask=there, other=0)
    return first, n, tl.minimum(tl.maximum(length, 0), table_tokens + n)


@triton.jit
def sequence_of(t, cu_seqlens_q, seq_lens, B, T, table_tokens, BLOCK_B: tl.constexpr):
    """Sequence of packed row t, its first row, new rows and cached length; length 0 of sequence 0 for a row of none."""
    offs_b = tl.arange(0, BLOCK_B)
    ends = tl.load(cu_seqlens_q + offs_b + 1, mask=offs_b < B, other=2147483647)
    b = tl.sum((ends <= t).to(tl.int32), 0)
    first, n, length = sequence_bounds(cu_seqlens_q, seq_lens, b, B, T, table_tokens)
    inside = (t >= first) & (t < first + n)
    return tl.where(inside, b, 0), first, n, tl.where(inside, length, 0)


@triton.jit
def page_of(page_table_row, start, offs, max_pages, P, PAGE: tl.constexpr, UNIFORM: tl.constexpr):
    """Page of tokens start + offs, -1 where there is none; one number when a whole block lies in one page (UNIFORM)."""
    entry = start // PAGE if UNIFORM else (start + offs) // PAGE
    page = tl.load(page_table_row + entry, mask=entry < max_pages, other=-1)
    return tl.where(page < P, page, -1)


@triton.jit
def slot_of(start, offs, PAGE: tl.constexpr, UNIFORM: tl.constexpr):
    """Position of tokens start + offs inside their pages."""
    return start % PAGE + offs if UNIFORM else (start + offs) % PAGE
