# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the GPU kernels of rank_lora share: tiles of tokens of one adapter, rows of [router; A], the choice of ranks.

The router and A (or B) of an adapter are one joint matrix of W = GW + RW rows: GW is the width of the widest router and
RW that of the widest adapter, both rounded up; rows that an adapter does not have are masked and never read.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(1)  # op.GATES
SIGMOID = tl.constexpr(2)
UNBIASED = tl.constexpr(3)
SMALLEST = tl.constexpr(2.0**-20)  # reference.SMALLEST


@triton.jit
def sorted_tile(tile, order, starts, T, adapters, BLOCK_T: tl.constexpr, SEGMENTS: tl.constexpr):
    """Tile number `tile` of tokens sorted by adapter: its adapter, -1 for none; its tokens; which of them exist.

    starts   [adapters + 3]: where in `order` the tokens without an adapter begin, then those of each adapter, then
             those whose adapter does not exist, then T
    """
    segment = tl.arange(0, SEGMENTS)
    low = tl.load(starts + segment, mask=segment < adapters + 2, other=0)
    high = tl.load(starts + segment + 1, mask=segment < adapters + 2, other=0)
    tiles = (high - low + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(tiles, 0)
    mine = tl.sum((ends <= tile).to(tl.int32), 0)
    here = segment == mine
    first = tl.sum(tl.where(here, low + (tile - ends + tiles) * BLOCK_T, 0), 0)
    end = tl.sum(tl.where(here, high, 0), 0)
    slot = first + tl.arange(0, BLOCK_T)
    live = slot < end
    token = tl.load(order + slot, mask=live, other=0).to(tl.int64)
    return tl.where(mine > adapters, -1, mine - 1), token, live


@triton.jit
def grouped_tile(first, adapter_of, T, adapters, BLOCK_T: tl.constexpr, SEGMENTS: tl.constexpr):
    """The same for few tokens, without a sort: token `first` leads a tile if BLOCK_T * n tokens before it share its
    adapter; tiles of other tokens have the adapter -1."""
    offs = tl.arange(0, SEGMENTS)
    adapter = tl.load(adapter_of + first)
    same = (tl.load(adapter_of + offs, mask=offs < T, other=-1) == adapter) & (offs < T)
    place = tl.cumsum(same.to(tl.int32), 0) - 1
    lead = tl.sum(tl.where(offs == first, place, 0), 0)
    member = same[None, :] & (place[None, :] == (lead + tl.arange(0, BLOCK_T))[:, None])
    token = tl.sum(tl.where(member, offs[None, :], 0), 1).to(tl.int64)
    live = tl.sum(member.to(tl.int32), 1) > 0
    leads = (lead % BLOCK_T == 0) & (adapter >= 0) & (adapter < adapters)
    return tl.where(leads, adapter, -1), token, live


@triton.jit
def place_of(places, adapter):
    """first_rank, ranks, first_row, rows, chosen, gate."""
    place = places + adapter * 6
    return (
        tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3), tl.load(place + 4),
        tl.load(place + 5),
    )  # fmt: skip


@triton.jit
def joint_rows(
    j, router, a, first_rank, ranks, first_row, rows, router_row, a_row, GW: tl.constexpr, ALIGNED: tl.constexpr
):
    """Addresses of joint rows j, and which of them the adapter has."""
    of_router = j < GW
    there = tl.where(of_router, rows, GW + ranks) > j
    router_at = router + (first_row + j).to(tl.int64) * router_row
    rank_at = a + (first_rank + j - GW).to(tl.int64) * a_row
    at = tl.where(of_router, router_at, rank_at)
    if ALIGNED:  # what the compiler knew of either address it does not know of a choice
        at = tl.multiple_of(at, [16])
    return at, there


@triton.jit
def block_of(j, ranks, rows, GW: tl.constexpr):
    """Ranks in a block; the block that joint row j scores or belongs to, -1 for ranks that do not exist."""
    block = tl.maximum(ranks // tl.maximum(rows, 1), 1)
    rank = j - GW
    return block, tl.where(j < GW, j, tl.where(rank < ranks, rank // block, -1))


@triton.jit
def route(sums, bias, ranks, first_row, rows, chosen, gate, GW: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Choose blocks for N tokens from their joint products [N, W]: the gate of each joint row in a picked block, -1 in
    others; how many picked blocks come before that row's."""
    j = tl.arange(0, W)
    _block, key = block_of(j, ranks, rows, GW)
    score = tl.where(gate == SOFTMAX, sums, 1.0 / (1.0 + tl.exp(-sums)))
    score += tl.load(bias + first_row + j, mask=j < rows, other=0.0)[None, :]
    left = tl.where((j < rows)[None, :], score, float("-inf"))
    gates = tl.full([N, W], -1.0, tl.float32)
    before = tl.zeros([N, W], tl.int32)
    top = tl.zeros([N], tl.float32)
    total = tl.zeros([N], tl.float32)
    for c in range(chosen):
        best = tl.max(left, 1)
        index = tl.min(tl.where(left == best[:, None], j[None, :], W), 1)  # ties go to the lowest index
        scored = j[None, :] == index[:, None]
        logit = tl.sum(tl.where(scored, sums, 0.0), 1)
        top = tl.where(c == 0, best, top)
        kept = tl.where(gate == SOFTMAX, tl.exp(best - top), tl.maximum(best, SMALLEST))
        kept = tl.where(gate == UNBIASED, 1.0 / (1.0 + tl.exp(-logit)), kept)
        total += kept
        gates = tl.where(key[None, :] == index[:, None], kept[:, None], gates)
        before += (index[:, None] < key[None, :]).to(tl.int32)
        left = tl.where(scored, float("-inf"), left)
    gates = tl.where(gates < 0.0, -1.0, gates / tl.where(total == 0.0, 1.0, total)[:, None])
    plain = tl.where((j >= GW) & (j - GW < ranks), 1.0, -1.0)
    return tl.where(rows == 0, plain[None, :], gates), before


@triton.jit
def keep(
    sums, weights, before, token, live, picked, gates, h, counts, ranks, first_row, rows,
    GW: tl.constexpr, W: tl.constexpr, CHOSEN: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """Write what the op returns beside y, from the result of `route`. Offsets of 32 bits: registers are scarce."""
    j = tl.arange(0, W)
    block, _key = block_of(j, ranks, rows, GW)
    taken = (weights >= 0.0) & live[:, None]
    of_row = taken & (j < rows)[None, :]
    slot = token.to(tl.int32)[:, None] * CHOSEN + before
    tl.store(picked + slot, tl.zeros_like(before) + j[None, :], mask=of_row)
    tl.store(gates + slot, weights, mask=of_row)
    # Whole numbers: their sum is the same in any order.
    count = tl.sum(of_row.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(counts + first_row + j, count, mask=j < rows, sem="relaxed")
    of_rank = taken & (j >= GW)[None, :]
    slot = token.to(tl.int32)[:, None] * ACTIVE + before * block + (tl.maximum(j - GW, 0) % block)[None, :]
    tl.store(h + slot, sums, mask=of_rank)
