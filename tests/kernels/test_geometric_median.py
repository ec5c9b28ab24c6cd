"""Geometric median: its two reads in every instruction set, exact cases, properties, bounds, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch_kernels.geometric_median import cpu, op, reference
from anabranch_kernels.geometric_median.op import STATUS, centred_gram, combine, geometric_median
from anabranch_kernels.geometric_median.solve import MAX_ITER, solve
from anabranch_kernels.native import extension

SHORT = [torch.float32, torch.bfloat16, torch.float16]
ISAS = extension.supported_isas()
F64 = torch.float64


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=random(seed), dtype=F64).to(dtype)


def objective(points, weights, x):
    """sum of w ||x - p|| [B], in float64 and in no way clever."""
    return (weights.double() * (points.double() - x.double()[:, None]).norm(dim=2)).sum(1)


def weiszfeld(points, weights, steps=2000):
    """The median by many plain steps: an independent peer, good wherever the median is not one of the points."""
    points, weights = points.double(), weights.double()
    x = (weights[:, :, None] * points).sum(1) / weights.sum(1, keepdim=True)
    for _ in range(steps):
        v = weights / (points - x[:, None]).norm(dim=2).clamp_min(1e-300)
        x = (v[:, :, None] * points).sum(1) / v.sum(1, keepdim=True)
    return x


def status(result):
    return [STATUS[index] for index in result.status.tolist()]


def gram_error(got, points, centre):
    """Largest error of an entry over the norms of its two rows."""
    middle = torch.zeros_like(points[:, 0]) if centre is None else centre
    rows = points.double() - middle.double()[:, None]
    norms = rows.norm(dim=2)
    allowed = (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-300)
    return ((got - rows @ rows.mT).abs() / allowed).max().item()


# ----------------------------------------------------------------------------------------------------- the two reads


@st.composite
def rows(draw):
    B, N = draw(st.integers(1, 3)), draw(st.integers(1, 14) | st.sampled_from([16, 17, 31, 32, 33, 48, 65, 80]))
    D = draw(st.integers(0, 70) | st.sampled_from([511, 512, 513, 1024, 1100, 9000]))
    dtype = draw(st.sampled_from(SHORT))
    seed = draw(st.integers(0, 2**16))
    centre = draw(st.sampled_from(["none", "row", "free"]))
    points = cloud(B, N, D, seed=seed) * draw(st.sampled_from([1.0, 1e-3, 1e3])) + draw(st.sampled_from([0.0, 7.0]))
    points = points.to(dtype)
    middle = {"none": None, "row": points[:, N // 2], "free": cloud(B, D, seed=seed + 1).to(dtype)}[centre]
    return points, middle, cloud(B, N, seed=seed + 2)


@given(rows())
@settings(max_examples=60)
def test_every_instruction_set_equals_float64(case):
    points, centre, coefficients = case
    N, D = points.shape[1:]
    wanted = reference.combine(points.double(), coefficients, None if centre is None else centre.double())
    middle = torch.zeros_like(points[:, 0]) if centre is None else centre
    spread = (points.double() - middle.double()[:, None]).abs()
    magnitude = (coefficients.abs()[:, :, None] * spread).sum(1) + middle.double().abs()
    for isa in ISAS:
        # A tile's products are added up in at least 8 lanes of at most 64 terms, and differences are rounded first.
        assert gram_error(cpu.centred_gram(points, centre, isa), points, centre) <= (min(D, 512) / 8 + 8) * 2.0**-24
        got = cpu.combine(points, coefficients, centre, isa)
        # Each term is rounded up to three times, each partial sum once; then comes one rounding to the dtype.
        half = torch.finfo(points.dtype).eps / 2
        bound = (N + 4) * 2.0**-24 * magnitude + half * wanted.abs() * (1 + half) + 2.0**-25
        assert ((got.double() - wanted).abs() <= bound).all()
    assert gram_error(reference.centred_gram(points, centre), points, centre) <= 1e-12


@pytest.mark.parametrize("N", [9, 35], ids="N={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype, N, threads):
    points, a = cloud(2, N, 50_003, dtype=dtype), cloud(2, N)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((centred_gram(points, points[:, 0]), combine(points, a, points[:, 0])))
    for gram, x in results[1:]:
        assert torch.equal(gram, results[0][0])
        assert torch.equal(x, results[0][1])
    assert gram_error(results[0][0], points, points[:, 0]) <= 2.0**-21


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("times", [1, 4, 11], ids=["N=7", "N=28", "N=77"])
def test_rows_too_large_or_too_small_to_be_squared_in_float32(isa, times):
    """Rows of ordinary size beside 1e30, 1e-30 and denormal ones: every entry keeps its relative accuracy."""
    sizes = torch.tensor([1.0, 1e30, 1e-30, 2.0, 1e-42, 1.0, 0.0], dtype=F64).repeat(times)
    points = (cloud(1, len(sizes), 700) * sizes[:, None]).float()
    points[0, 1, 300:] = 0  # in some columns only
    gram = cpu.centred_gram(points, None, isa)
    assert gram.isfinite().all()
    assert gram_error(gram, points, None) <= 2.0**-21


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "all bits"])
@pytest.mark.parametrize("N", [6, 37], ids="N={}".format)
def test_a_row_that_is_not_finite_spoils_no_other(isa, bad, N):
    points = cloud(1, N, 600, dtype=torch.float32)
    clean = cpu.centred_gram(points, points[:, 0], isa)
    if bad == "all bits":  # a NaN that rounding would turn into zero
        points.view(torch.int32)[0, 3, 555] = 0x7FFFFFFF
    else:
        points[0, 3, 555] = bad
    gram = cpu.centred_gram(points, points[:, 0], isa)
    others = torch.arange(N) != 3
    assert torch.equal(gram[:, others][:, :, others], clean[:, others][:, :, others])
    assert not gram[0, 3, 3].isfinite()
    a = torch.zeros(1, N, dtype=F64)
    a[0, :3] = torch.tensor([0.5, 0.25, 0.25])
    assert cpu.combine(points, a, None, isa).isfinite().all()  # the bad row has no part in it


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_in_a_centre_counts_as_zero(isa):
    points, centre = cloud(1, 5, 99, dtype=torch.float32), cloud(1, 99, dtype=torch.float32)
    holes = centre.clone()
    centre[0, [3, 98]] = 0
    holes[0, 3], holes[0, 98] = torch.nan, torch.inf
    assert torch.equal(cpu.centred_gram(points, holes, isa), cpu.centred_gram(points, centre, isa))
    a = cloud(1, 5)
    assert torch.equal(cpu.combine(points, a, holes, isa), cpu.combine(points, a, centre, isa))
    assert_close(reference.centred_gram(points, holes), reference.centred_gram(points, centre))


@pytest.mark.parametrize("dtype", [*SHORT, F64], ids=str)
def test_one_coefficient_of_one_copies_its_row(dtype):
    points = cloud(2, 4, 130).to(dtype)
    points[0, 1] = torch.nan
    points[0, 2, 5] = -0.0
    a = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=F64)
    got = combine(points, a, points[:, 3])
    bits = torch.int64 if dtype == F64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), torch.stack([points[0, 2], points[1, 0]]).view(bits))


@pytest.mark.parametrize("N", [5, 20], ids="N={}".format)
def test_strided_rows_give_the_same_bits(N):
    points, a = cloud(2, N, 77, dtype=torch.float32), cloud(2, N)
    centre = points[:, 1]
    gram, x = centred_gram(points, centre), combine(points, a, centre)
    wider = torch.full((2, N, 3, 100), torch.nan)
    wider[:, :, 1, 11:88] = points
    for view in (wider[:, :, 1, 11:88], points.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(centred_gram(view, centre), gram)
        assert torch.equal(combine(view, a, view[:, 1]), x)


# ------------------------------------------------------------------------------------------------ what the median is


@st.composite
def problems(draw):
    """Points with weights: in groups, with outliers, duplicates and zero weights."""
    B, N, D = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**20))
    points = cloud(B, N, D, seed=seed)
    if draw(st.booleans()):
        points[:, : N // 3] += draw(st.sampled_from([3.0, 100.0, 1e4]))
    if draw(st.booleans()) and N > 3:
        points[:, 1] = points[:, 2]
    weights = (cloud(B, N, seed=seed + 1) * draw(st.sampled_from([0.0, 1.0, 4.0]))).exp()
    if draw(st.booleans()):
        weights[:, N // 2 :: 3] = 0
        weights[:, 0] = 1
    return points, weights


@given(problems())
@settings(max_examples=80)
def test_no_point_tried_is_better_than_the_bound_says(problem):
    points, weights = problem
    result = geometric_median(points, weights)
    f = objective(points, weights, result.point)
    assert (result.status != MAX_ITER).all()
    tried = [weiszfeld(points, weights, 100), *points.unbind(1), weiszfeld(points, weights, 3)]
    for x in tried:
        # The bound, and what float64 loses in a sum of N distances of points that lie up to 1e4 from each other.
        assert (f - objective(points, weights, x) <= (result.gap_rel + 1e-14) * f).all()
    assert (result.gap_rel <= 1e-6).all()
    assert_close(result.coefficients.sum(1), torch.ones(len(points), dtype=F64))
    assert (result.coefficients >= 0).all()


@pytest.mark.parametrize(("dtype", "gap"), [(F64, 1e-9), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize(("N", "D"), [(4, 3), (32, 1000), (150, 20), (7, 9000)], ids=str)
def test_the_median_of_plain_clouds(N, D, dtype, gap):
    points, weights = cloud(2, N, D, dtype=dtype), torch.rand(2, N, generator=random(1), dtype=F64) + 0.1
    result = geometric_median(points, weights)
    wanted = weiszfeld(points, weights)
    f, best = (objective(points, weights, x) for x in (result.point, wanted))
    assert (result.gap_rel <= gap).all()
    assert (f - best <= gap * best).all()
    # Where the Hessian is w / r (1 - 1/D) or so, the gradient left by rounding moves x this little.
    assert ((result.point.double() - wanted).norm(dim=1) <= 1e-5 * f / weights.sum(1)).all()


def test_certificates_are_bounds_at_every_step():
    """Stopped after k steps the bound still covers what is missing, and is no more than a factor from useful."""
    points, weights = cloud(6, 12, 5, seed=3), torch.ones(6, 12, dtype=F64)
    points[:, :4] += 50
    f_best = objective(points, weights, geometric_median(points).point)
    for steps in range(6):
        result = geometric_median(points, max_steps=steps)
        missing = objective(points, weights, result.point) / f_best - 1
        assert (missing <= result.gap_rel + 1e-14).all()
        assert ((result.gap_rel <= 1e-6) == (result.status != MAX_ITER)).all()
    assert (geometric_median(points, max_steps=0).status == MAX_ITER).any()


# ------------------------------------------------------------------------------------------------------- exact cases


def one(points, weights=None, dtype=F64):
    points = torch.tensor(points, dtype=dtype)[None]
    return geometric_median(points, None if weights is None else torch.tensor(weights, dtype=F64)[None])


@pytest.mark.parametrize("dtype", [F64, *SHORT], ids=str)
def test_exact_answers(dtype):
    triangle = [[0.0, 0.0], [1.0, 0.25], [-1.0, 0.25]]  # an angle of more than 120 degrees at the first corner
    for points, weights, answer, name in (
        ([[3.0, 4.0]], None, [3.0, 4.0], "anchor"),
        ([[1.0, 2.0], [3.0, 4.0]], None, [2.0, 3.0], "collinear"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.5], [3.0, 4.0], "anchor"),
        (triangle, None, [0.0, 0.0], "anchor"),
        ([[0.0, 0.0], [5.0, 1.0], [2.0, 7.0], [9.0, 9.0]], [4.0, 1.0, 1.0, 1.5], [0.0, 0.0], "anchor"),
        ([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]], None, [1.0, 1.0], "converged"),
        ([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], None, [1.0, 1.0], "anchor"),
        ([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0], [8.0, 8.0]], None, [3.0, 3.0], "collinear"),
        ([[7.0, 1.0]] * 5, None, [7.0, 1.0], "anchor"),
        ([[7.0, 1.0]] * 3 + [[0.0, 0.0], [1.0, 3.0]], None, [7.0, 1.0], "anchor"),  # counts, not distinct points
    ):
        result = one(points, weights, dtype)
        assert status(result) == [name]
        wanted = torch.tensor([answer], dtype=dtype)
        if name == "converged":
            assert_close(result.point, wanted)
        else:
            assert torch.equal(result.point, wanted)
        assert result.gap_rel.item() <= 1e-7


def test_rows_are_returned_bit_for_bit_also_from_far_centres():
    points = cloud(1, 9, 300, dtype=torch.float32)
    weights = torch.ones(1, 9)
    weights[0, 4] = 20
    for centre in (None, points.mean(1), torch.full((1, 300), 1e5)):
        result = geometric_median(points, weights, centre=centre)
        assert status(result) == ["anchor"]
        assert torch.equal(result.point[0], points[0, 4])


@pytest.mark.parametrize("excess", [1e-1, 1e-3, 1e-5, 1e-7])
def test_a_median_just_off_a_point_is_found(excess):
    """Plain steps need from a hundred to millions here."""
    others = cloud(1, 8, 3, seed=5)
    point = torch.zeros(1, 1, 3, dtype=F64)
    pull = (others / others.norm(dim=2, keepdim=True)).sum(1).norm().item()
    weights = torch.ones(1, 9, dtype=F64)
    weights[0, 0] = pull * (1 - excess)
    points = torch.cat([point, others], 1)
    result = geometric_median(points, weights)
    assert status(result) == ["converged"]
    assert (result.gap_rel <= 1e-6).all()
    assert (objective(points, weights, result.point) < objective(points, weights, point[:, 0])).all()
    weights[0, 0] = pull * (1 + excess)
    assert status(geometric_median(points, weights)) == ["anchor"]


# -------------------------------------------------------------------------------------------------------- properties


@given(st.integers(0, 2**16), st.integers(3, 15), st.integers(2, 9))
@settings(max_examples=15)
def test_moves_turns_and_grows_with_its_points(seed, N, D):
    points, weights = cloud(1, N, D, seed=seed), torch.rand(1, N, generator=random(seed), dtype=F64) + 0.05
    x = geometric_median(points, weights).point
    shift = cloud(1, D, seed=seed + 1) * 10
    turn = torch.linalg.qr(cloud(D, D, seed=seed + 2))[0]
    order = torch.randperm(N, generator=random(seed))
    # x is where f is flat: it is found to about the root of float64's rounding, as far as points lie apart.
    close = {"atol": 1e-6, "rtol": 0}
    assert_close(geometric_median(points + shift[:, None], weights).point, x + shift, **close)
    assert_close(geometric_median(points @ turn, weights).point, x @ turn, **close)
    assert_close(geometric_median(points * 1e-3, weights).point, x * 1e-3, **close)
    assert_close(geometric_median(points[:, order], weights[:, order]).point, x, **close)
    assert_close(geometric_median(points, weights * 7).point, x, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_a_batch_is_its_problems(dtype):
    points, weights = cloud(5, 8, 130, dtype=dtype), torch.rand(5, 8, generator=random(2)) + 0.1
    points[1, 3:] = points[1, :1]  # an anchor among them
    weights[2, 1] = 100
    together = geometric_median(points, weights)
    for b in range(5):
        alone = geometric_median(points[b : b + 1], weights[b : b + 1])
        assert_close(alone.point[0], together.point[b])
        assert alone.status[0] == together.status[b]


@pytest.mark.parametrize("far", [1e3, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("first", [True, False], ids=["outlier first", "outlier last"])
def test_a_minority_cannot_drag_the_median_away(far, first):
    """Minsker's bound, with 4 of 9 points far away; the first row is also the centre, and may be one of them."""
    honest = cloud(1, 5, 40, dtype=torch.float32)
    bad = torch.full((1, 4, 40), far)
    points = torch.cat([bad, honest] if first else [honest, bad], 1)
    alpha = 4 / 9
    radius = (honest - honest.mean(1, keepdim=True)).norm(dim=2).max()
    result = geometric_median(points)
    moved = (result.point - honest.mean(1)).norm()
    assert moved <= (1 - alpha) / (1 - 2 * alpha) ** 0.5 * radius
    drop_none = geometric_median(torch.cat([honest, honest.mean(1, keepdim=True) + 1e3 * torch.ones(1, 4, 40)], 1))
    assert_close(result.point, drop_none.point, atol=0.05, rtol=0)  # how far hardly matters


def test_a_majority_does_drag_it_away():
    points = torch.cat([cloud(1, 4, 40), torch.full((1, 5, 40), 1e6, dtype=F64)], 1)
    assert geometric_median(points).point.norm() > 1e6


@pytest.mark.parametrize("power", range(8))
def test_an_offset_costs_nothing_but_the_digits_of_the_inputs(power):
    points = (cloud(1, 12, 200, seed=9) + 10.0**power).float()
    weights = torch.ones(1, 12)
    result = geometric_median(points, weights)
    exact = geometric_median(points.double(), weights)
    f, best = (objective(points, weights, r.point) for r in (result, exact))
    step = 2.0**-24 * 10.0**power * 200**0.5  # the result is rounded to float32 once
    assert (f - best <= 1e-6 * best + 12 * step).all()
    assert (objective(points, weights, exact.point + result.point * 0) <= best).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_rows_that_are_not_finite_are_refused_or_dropped(dtype):
    points = cloud(2, 7, 33, dtype=dtype)
    points[0, 0, 4], points[0, 5, 0], points[1, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"row 0 of problem 0 is not finite.*\(3 such rows in all\)"):
        geometric_median(points)
    result = geometric_median(points, non_finite="drop")
    assert result.dropped.nonzero().tolist() == [[0, 0], [0, 5], [1, 2]]
    for b, kept in ((0, [1, 2, 3, 4, 6]), (1, [0, 1, 3, 4, 5, 6])):
        assert_close(result.point[b], geometric_median(points[b : b + 1, kept]).point[0])
    weights = torch.ones(2, 7).masked_fill(result.dropped, 0)
    assert_close(geometric_median(points, weights).point, result.point)  # of weight zero they may hold anything


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="needs a finite row of positive weight"):
        geometric_median(torch.full((1, 3, 4), torch.nan), non_finite="drop")
    with pytest.raises(ValueError, match="needs a finite row of positive weight"):
        geometric_median(torch.ones(1, 3, 4), torch.zeros(1, 3))


def test_rows_of_no_length():
    assert geometric_median(torch.ones(2, 3, 0)).point.shape == (2, 0)
    assert geometric_median(torch.ones(0, 3, 5)).point.shape == (0, 5)


def test_hard_problems_by_the_hundred():
    """Duplicates, a third of the points far away, weights over seven orders of magnitude: all are solved."""
    generator = random(7)
    for trial in range(12):
        B, N, D = 40, 2 + 3 * trial, 1 + trial % 11
        points = torch.randn(B, N, D, generator=generator, dtype=F64)
        if trial % 3 == 0:
            points[:, : max(1, N // 4)] = points[:, -1:]
        points[:, : N // 3] *= 10.0 ** (trial % 5)
        weights = (torch.rand(B, N, generator=generator, dtype=F64) * 16 - 8).exp()
        result = geometric_median(points, weights)
        assert (result.gap_rel <= 1e-12).all()
        assert (result.status != MAX_ITER).all()


def test_the_gram_matrix_alone_is_enough():
    points, weights = cloud(1, 9, 50), torch.ones(1, 9, dtype=F64)
    solution = solve(points @ points.mT, weights, tol=1e-9, max_steps=50, resolution=2.0**-52)
    assert_close((solution.coefficients[:, :, None] * points).sum(1), geometric_median(points).point)


# --------------------------------------------------------------------------------------------- gradients, registration


@pytest.mark.parametrize(("N", "D"), [(5, 7), (7, 3), (3, 2)], ids=str)
def test_gradients_are_exact(N, D):
    points, weights = cloud(2, N, D, seed=4), torch.rand(2, N, generator=random(4), dtype=F64) + 0.3
    points[:, 0] += 0.3
    assert "anchor" not in status(geometric_median(points, weights))
    inputs = (points.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, w: geometric_median(p, w).point, inputs)


def test_gradients_with_weights_of_zero_and_dropped_rows():
    points, weights = cloud(1, 8, 5, seed=4), torch.ones(1, 8, dtype=F64)
    weights[0, 2] = 0
    points[0, 6] = torch.nan
    kept = [0, 1, 2, 3, 4, 5, 7]
    whole, some = (x.clone().requires_grad_() for x in (points, points[:, kept]))
    w, v = (x.clone().requires_grad_() for x in (weights, weights[:, kept]))
    upstream = cloud(1, 5)
    geometric_median(whole, w, non_finite="drop").point.backward(upstream)
    geometric_median(some, v).point.backward(upstream)
    assert_close(whole.grad[:, kept], some.grad)
    assert_close(w.grad[:, kept], v.grad)
    assert not whole.grad[0, 6].any()
    assert w.grad[0, 6] == 0
    assert not some.grad[0, 2].any()
    one_sided = geometric_median(points[:, kept], weights[:, kept] + 1e-6 * torch.eye(7, dtype=F64)[2])
    change = (one_sided.point - geometric_median(points[:, kept], weights[:, kept]).point) / 1e-6
    assert_close(v.grad[0, 2], (change * upstream).sum(), atol=1e-4, rtol=0)


def test_the_gradient_of_a_given_row_is_its_own():
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.25], [-1.0, 0.25]]]).requires_grad_()
    geometric_median(points).point.backward(torch.tensor([[2.0, 3.0]]))
    assert points.grad.tolist() == [[[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]]]


def test_short_dtypes_have_gradients_of_their_precision():
    points = cloud(1, 9, 40, dtype=torch.float32)
    short, exact = points.clone().requires_grad_(), points.double().requires_grad_()
    upstream = cloud(1, 40)
    geometric_median(short).point.backward(upstream.float())
    geometric_median(exact).point.backward(upstream)
    assert_close(short.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)


def test_opcheck():
    points, weights = cloud(2, 5, 11, dtype=torch.float32), torch.rand(2, 5, generator=random())
    ops = torch.ops.anabranch
    torch.library.opcheck(ops.centred_gram.default, (points, points[:, 0]))
    torch.library.opcheck(ops.centred_gram.default, (points.double(), None))
    torch.library.opcheck(ops.combine.default, (points, weights.double(), points[:, 1]))
    gram = points.double() @ points.double().mT
    torch.library.opcheck(ops.geometric_median_solve.default, (gram, weights.double(), 1e-6, 100, 2.0**-52))
    torch.library.opcheck(ops.geometric_median.default, (points, weights, None, False, 1e-6, 100))
    x, a, _, stat, dropped, gram = ops.geometric_median(points, weights, None, False, 1e-6, 100)
    torch.library.opcheck(ops.geometric_median_backward.default, (x, points, weights, x, a, stat, dropped, gram))


def test_compiles_whole():
    points = cloud(2, 6, 30, dtype=torch.float32)
    eager, compiled = (points.clone().requires_grad_() for _ in range(2))
    function = torch.compile(lambda p: geometric_median(p).point.relu(), fullgraph=True, backend="aot_eager")
    wanted = geometric_median(eager).point.relu()
    got = function(compiled)
    assert torch.equal(got, wanted)
    wanted.sum().backward()
    got.sum().backward()
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, w: geometric_median(p[0]), r"points must be \[B, N, D\] in one of .*, got \[3, 4\]"),
        (lambda p, w: geometric_median(p.int()), r"points must be \[B, N, D\] in one of .*int32"),
        (lambda p, w: geometric_median(p[:, :0]), r"a median needs points, got \[2, 0, 4\]"),
        (lambda p, w: geometric_median(p, w[:, :2]), r"weights must be \[2, 3\] floats on cpu, got \[2, 2\]"),
        (lambda p, w: geometric_median(p, w.int()), r"weights must be \[2, 3\] floats"),
        (lambda p, w: geometric_median(p, w.to("meta")), "weights must be .* on cpu, got .*meta"),
        (lambda p, w: geometric_median(p, -w), "weights must be finite and not negative"),
        (lambda p, w: geometric_median(p, w * torch.nan), "weights must be finite and not negative"),
        (lambda p, w: geometric_median(p, centre=p[:, 0].double()), r"centre must be \[2, 4\] torch.float32"),
        (lambda p, w: geometric_median(p, centre=p[0]), r"centre must be \[2, 4\] torch.float32 on cpu, got \[3, 4\]"),
        (lambda p, w: geometric_median(p, non_finite="ignore"), "non_finite must be 'raise' or 'drop', got 'ignore'"),
        (lambda p, w: geometric_median(p, tol=0), "tol must be positive .* got tol=0"),
        (lambda p, w: geometric_median(p, max_steps=-1), "max_steps not negative, got .*max_steps=-1"),
        (lambda p, w: combine(p, w), r"coefficients must be \[2, 3\] torch.float64 on cpu, got \[2, 3\] torch.float32"),
        (lambda p, w: combine(p, w[:, :1].double()), r"coefficients must be \[2, 3\] torch.float64"),
        (lambda p, w: op.solve(p, w, tol=1e-6, max_steps=1, resolution=0), r"gram must be \[B, N, N\] .* \[2, 3, 4\]"),
        (lambda p, w: centred_gram(p, p[:1, 0]), r"centre must be \[2, 4\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(2, 3, 4), torch.ones(2, 3))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        cpu.centred_gram(torch.ones(1, 2, 3), None, "sse9")
