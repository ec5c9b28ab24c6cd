"""Merging is the best of its kind, RoPE does not see it, and what it says it loses is what it loses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from anabranch.convert.merge import (
    Merge,
    Statistics,
    key_energy,
    merge_by_mean,
    merge_by_svd,
    merge_error,
    to_complex,
    to_rows,
)
from anabranch.models.rotary import rotary_frequencies, rotate


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


@st.composite
def layers(draw_from: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Queries and keys over n samples: 1, 2, 4 or 6 K heads, some of them alike, some never read."""
    Hk, per_head, F = (
        draw_from(st.sampled_from([1, 2, 4, 6])),
        draw_from(st.integers(1, 2)),
        draw_from(st.integers(1, 3)),
    )
    F, n, seed = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 9)), draw_from(st.integers(0, 1000))
    queries, keys = draw((Hk * per_head, F, n), seed), draw((Hk, F, n), seed + 1)
    if draw_from(st.booleans()):
        keys[-1] = keys[0]
    if draw_from(st.booleans()):
        queries[:per_head] = 0
    keys = keys * 10.0 ** draw_from(st.integers(-3, 3))
    return queries, keys


def counts(keys: Tensor) -> list[int]:
    return [n for n in range(1, len(keys) + 1) if len(keys) % n == 0]


@given(layers())
def test_no_other_merge_of_a_group_loses_less(layer):
    """Eckart, Young, Mirsky: neither the mean nor a small change of factors or mixture."""
    queries, keys = layer
    statistics = Statistics.of(queries, keys)
    slack = 1e-12 * float(key_energy(statistics).sum())
    for heads in counts(keys):
        best = merge_by_svd(statistics, heads)
        lost = float(merge_error(statistics, best).sum())
        near = [
            Merge(heads=heads, mix=best.mix + 0.01 * draw(best.mix.shape, 2), factors=best.factors),
            Merge(heads=heads, mix=best.mix, factors=best.factors + 0.01 * draw(best.mix.shape, 3)),
        ]
        for other in (merge_by_mean(statistics, heads), *near):
            assert lost <= float(merge_error(statistics, other).sum()) + slack


@given(layers())
def test_the_loss_is_what_a_singular_value_decomposition_leaves(layer):
    queries, keys = layer
    statistics = Statistics.of(queries, keys)
    Hk, F, _ = keys.shape
    energy = np.square(np.abs(queries.numpy())).sum(-1).reshape(Hk, -1, F).sum(1)
    for heads in counts(keys):
        left = 0.0
        for f in range(F):
            stacked = np.sqrt(energy[:, f, None]) * keys[:, f].numpy()
            for group in np.split(stacked, heads):
                left += np.square(np.linalg.svd(group, compute_uv=False)[1:]).sum()
        lost = float(merge_error(statistics, merge_by_svd(statistics, heads)).sum())
        assert lost == pytest.approx(left, rel=1e-9, abs=1e-12 * float(key_energy(statistics).sum()))


@given(layers())
def test_the_loss_is_counted_as_it_is_defined(layer):
    queries, keys = layer
    statistics = Statistics.of(queries, keys)
    for heads in counts(keys):
        for merge in (merge_by_mean(statistics, heads), merge_by_svd(statistics, heads)):
            shared = merge.shared_keys(keys).repeat_interleave(len(keys) // heads, 0)
            left = (keys - merge.factors[..., None] * shared).abs().square().sum(-1)
            scale = key_energy(statistics).sum().item()
            assert_close(merge_error(statistics, merge), statistics.energy * left, atol=1e-12 * scale, rtol=1e-9)


@given(layers())
def test_more_heads_never_lose_more(layer):
    queries, keys = layer
    statistics = Statistics.of(queries, keys)
    lost = {n: merge_error(statistics, merge_by_svd(statistics, n)).sum().item() for n in counts(keys)}
    slack = 1e-12 * key_energy(statistics).sum().item()
    assert all(lost[more] <= lost[n] + slack for n in lost for more in lost if more % n == 0)
    assert lost[len(keys)] <= slack


@pytest.mark.parametrize("heads", [1, 2])
def test_copies_by_complex_factors_are_merged_without_loss(heads):
    bases = draw((heads, 3, 20), 0).repeat_interleave(4 // heads, 0)
    keys = bases * draw((4, 3), 1)[..., None]
    statistics = Statistics.of(draw((8, 3, 20), 2), keys)
    merge = merge_by_svd(statistics, heads)
    assert_close(merge.factors[..., None] * merge.shared_keys(keys).repeat_interleave(4 // heads, 0), keys)
    assert merge_error(statistics, merge_by_mean(statistics, heads)).sum() > 1


def test_what_the_product_leaves_open_is_settled():
    """Equal heads keep their size and need no factor; others have factors of mean square one without a common phase."""
    keys, queries = draw((1, 3, 20), 0).expand(4, 3, 20), draw((8, 3, 20), 1)
    merge = merge_by_svd(Statistics.of(queries, keys), 2)
    assert_close(merge.factors, torch.ones(4, 3, dtype=torch.complex128))
    assert_close(merge.shared_keys(keys), keys[:2])
    factors = merge_by_svd(Statistics.of(queries, draw((4, 3, 20), 2)), 2).factors.unflatten(0, (2, 2))
    assert_close(factors.abs().square().mean(1), torch.ones(2, 3, dtype=torch.float64))
    assert_close(factors.sum(1).imag, torch.zeros(2, 3, dtype=torch.float64))
    assert (factors.sum(1).real > 0).all()


def test_heads_that_nobody_reads_do_no_harm():
    queries, keys = draw((4, 2, 9), 0), draw((4, 2, 9), 1)
    queries[0], queries[2:] = 0, 0  # one head of the first group, both of the second
    statistics = Statistics.of(queries, keys)
    merge = merge_by_svd(statistics, 2)
    assert torch.isfinite(torch.view_as_real(merge.mix)).all()
    assert torch.isfinite(torch.view_as_real(merge.factors)).all()
    assert_close(merge.factors[1][:, None] * merge.shared_keys(keys)[0], keys[1])  # the one that is read is kept
    assert merge_error(statistics, merge).sum() < 1e-12


@given(st.integers(0, 1000), st.integers(0, 5000), st.integers(0, 5000))
def test_rope_does_not_see_the_factors(seed, there, here):
    """Scores of folded queries with a shared key are those of the queries with its copies, at any two positions."""
    queries, shared, factors = draw((4, 3, 1), seed), draw((1, 3, 1), seed + 1), draw((2, 3), seed + 2)
    merge = Merge(heads=1, mix=factors, factors=factors)  # the mixture is not used here
    keys = factors[..., None] * shared
    angles = rotary_frequencies(6, 100.0).double()

    def turned(x: Tensor, position: int) -> Tensor:
        heads = to_rows(x).T.unflatten(1, (len(x), 6))
        return rotate(heads, (position * angles).cos(), (position * angles).sin())[0]

    plain = (turned(queries, here).unflatten(0, (2, 2)) * turned(keys, there)[:, None]).sum(-1).flatten()
    folded = (turned(merge.fold_queries(queries), here) * turned(shared, there)).sum(-1)
    assert_close(folded, plain, atol=1e-9, rtol=1e-9)


def test_pairs_are_those_of_half_rotation():
    """Element f and element f + D/2 of a head are the two parts of one number, which RoPE turns."""
    rows = torch.arange(16.0).view(8, 2)  # two heads of width 4
    heads = to_complex(rows, 2)
    assert heads[1, 0, 1] == complex(rows[4, 1], rows[6, 1])
    assert torch.equal(to_rows(heads), rows.double())
    angle = rotary_frequencies(4, 100.0)
    turned = rotate(rows.T.unflatten(1, (2, 4)), (7 * angle).cos(), (7 * angle).sin())
    phases = torch.polar(torch.ones(2), 7 * angle[2:])
    assert_close(to_complex(turned.flatten(1).T, 2), heads * phases[None, :, None], atol=1e-5, rtol=1e-6)


def test_the_mean_is_the_mean():
    keys = draw((6, 2, 5), 0)
    merge = merge_by_mean(Statistics.of(draw((6, 2, 5), 1), keys), 2)
    assert_close(merge.shared_keys(keys), torch.stack([keys[:3].mean(0), keys[3:].mean(0)]))
    assert torch.equal(merge.fold_queries(keys), keys)


def test_statistics_of_parts_add_up():
    queries, keys = draw((4, 2, 10), 0), draw((2, 2, 10), 1)
    parts = Statistics.of(queries[..., :3], keys[..., :3]) + Statistics.of(queries[..., 3:], keys[..., 3:])
    whole = Statistics.of(queries, keys)
    assert_close(parts.gram, whole.gram)
    assert_close(parts.energy, whole.energy)
    assert math.isclose(whole.energy[1, 0].item(), queries[2:, 0].abs().square().sum().item())
    assert_close(whole.gram[1, 0, 1], (keys[0, 1] * keys[1, 1].conj()).sum())
