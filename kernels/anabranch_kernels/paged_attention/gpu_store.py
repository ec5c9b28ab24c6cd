# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""New keys and values into their pages on the GPU; int8 pages are quantised on the way.

Layout   one program per new token writes its rows of all heads, K then V; rows are contiguous, a row is a head.
Bound    memory: every element read once and written once.
Numerics scale = max|row| / 127 and row / scale with correctly rounded divisions, nearest-even: the CPU's int8 values.
Not here slots past the last page: they are skipped, as negative ones are; a GPU cannot raise.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Plan


@cache
def plan(Hk: int, Hv: int, Dk: int, Dv: int, page: int) -> Plan:
    constants = {
        "HK": Hk, "HV": Hv, "DK": Dk, "DV": Dv, "PAGE": page,
        "HK_PAD": triton.next_power_of_2(Hk), "HV_PAD": triton.next_power_of_2(Hv),
        "DK_PAD": triton.next_power_of_2(Dk), "DV_PAD": triton.next_power_of_2(Dv),
    }  # fmt: skip
    return Plan(constants=constants, num_warps=4, num_stages=1)


@triton.jit
def _store_rows(
    new, cache, scales, t, page, offset, new_token, new_head, cache_page, cache_head, cache_slot,
    H: tl.constexpr, D: tl.constexpr, H_PAD: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, H_PAD)
    offs_d = tl.arange(0, D_PAD)
    inside = (head < H)[:, None] & (offs_d < D)
    rows = tl.load(new + t * new_token + head[:, None] * new_head + offs_d, mask=inside, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.div_rn(tl.max(tl.abs(rows), 1), tl.full([H_PAD], 127.0, tl.float32))
        tl.store(scales + (page * H + head) * PAGE + offset, scale, mask=head < H)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        rows = tl.div_rn(rows, divisor[:, None] + tl.zeros([H_PAD, D_PAD], tl.float32))
        # Adding and taking away 1.5 * 2**23 leaves the nearest whole number, ties to even.
        rows = tl.minimum(tl.maximum((rows + 12582912.0) - 12582912.0, -127.0), 127.0)
    target = cache + page * cache_page + offset * cache_slot + head[:, None].to(tl.int64) * cache_head + offs_d
    tl.store(target, rows.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def store_kernel(
    k, v, k_cache, v_cache, slots, k_scales, v_scales, P,
    k_token, k_row, v_token, v_row, k_page, k_head, k_slot, v_page, v_head, v_slot,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    HK_PAD: tl.constexpr, HV_PAD: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    page = slot // PAGE
    if (slot >= 0) & (page < P):
        _store_rows(
            k, k_cache, k_scales, t, page, slot % PAGE, k_token, k_row, k_page, k_head, k_slot,
            HK, DK, HK_PAD, DK_PAD, PAGE,
        )  # fmt: skip
        _store_rows(
            v, v_cache, v_scales, t, page, slot % PAGE, v_token, v_row, v_page, v_head, v_slot,
            HV, DV, HV_PAD, DV_PAD, PAGE,
        )  # fmt: skip


def store(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scales: Tensor | None, v_scales: Tensor | None,
) -> None:  # fmt: skip
    P, Hk, page, Dk = k_cache.shape
    Hv, Dv = v_cache.shape[1], v_cache.shape[3]
    chosen = plan(Hk, Hv, Dk, Dv, page)
    store_kernel[k.shape[0],](
        k, v, k_cache, v_cache, slots, k_scales, v_scales, P,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        **chosen.constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
