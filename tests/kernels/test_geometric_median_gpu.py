"""The Triton kernels of the geometric median against the reference; interpreted on a CPU where there is no GPU.

Sizes are small because the interpreter is slow; they cross every border: blocks of rows, tiles, stretches, problems.
"""

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.geometric_median import reference
from anabranch_kernels.geometric_median.op import ANCHOR, COLLINEAR, CONVERGED, MAX_ITER, geometric_median, resolution
from anabranch_kernels.geometric_median.solve import distances_squared, solve

pytest.importorskip("triton")
from anabranch_kernels.geometric_median import gpu, gpu_solve

# What overflows float32 is found and taken again; NaN rows stay NaN: NumPy, under the interpreter, warns of both.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
# Of the product of two norms: what is left out and rounded in x = h + l, up to 2**-22 and 2**-23, and sums of 64 terms.
GRAM_ERROR = (4 + 2 + 8) * 2.0**-24


def cloud(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gram_error(got, points, centre):
    """Largest error of an entry over the norms of its two rows."""
    middle = torch.zeros_like(points[:, 0]) if centre is None else centre
    rows = points.double() - middle.double()[:, None]
    norms = rows.norm(dim=2)
    allowed = (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-300)
    return ((got.cpu() - rows @ rows.mT).abs() / allowed).max().item()


def centred_gram(points, centre=None):
    return gpu.centred_gram(points.to(DEVICE), None if centre is None else centre.to(DEVICE)).cpu()


def combine(points, coefficients, centre=None):
    centre = None if centre is None else centre.to(DEVICE)
    return gpu.combine(points.to(DEVICE), coefficients.to(DEVICE), centre).cpu()


# ----------------------------------------------------------------------------------------------------- the two reads


@pytest.mark.parametrize(
    ("B", "N", "D", "centre", "dtype"),
    [
        (1, 1, 1, "none", torch.float32), (2, 2, 63, "row", torch.float32), (3, 5, 70, "free", torch.float32),
        (3, 5, 70, "none", torch.bfloat16), (2, 16, 65, "free", torch.float16), (1, 5, 70, "free", F64),
        (2, 17, 100, "row", torch.float32), (1, 32, 33, "free", torch.bfloat16), (1, 33, 64, "row", torch.float32),
        (1, 64, 66, "free", torch.float16), (2, 65, 33, "row", torch.bfloat16), (1, 70, 65, "free", torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_reference(B, N, D, centre, dtype):
    points = (cloud(B, N, D, seed=N) + (7 if centre == "row" else 0)).to(dtype)
    middle = {"none": None, "row": points[:, N // 2], "free": cloud(B, D, seed=1).to(dtype)}[centre]
    gram = centred_gram(points, middle)
    assert gram_error(gram, points, middle) <= (1e-12 if dtype == F64 else GRAM_ERROR)
    assert torch.equal(gram, gram.mT)
    a = cloud(B, N, seed=2)
    a[:, N // 3 + 1 :: 3] = 0
    wanted = reference.combine(points.double(), a, None if middle is None else middle.double())
    zero = torch.zeros_like(points[:, 0]) if middle is None else middle
    spread = (points.double() - zero.double()[:, None]).abs()
    magnitude = (a.abs()[:, :, None] * spread).sum(1) + zero.double().abs()
    step = torch.finfo(dtype).eps  # half of it where Triton is not interpreted, which cuts bfloat16 off
    # Each term is rounded up to three times, each partial sum once; then comes one rounding to the dtype.
    bound = (N + 4) * 2.0**-24 * magnitude + step * wanted.abs() * (1 + step) + 2.0**-25
    assert ((combine(points, a, middle).double() - wanted).abs() <= bound).all()


def test_several_stretches_are_added_up():
    points = cloud(1, 3, 2 * gpu.WIDTH + 77, dtype=torch.float32)
    assert gram_error(centred_gram(points, points[:, 0]), points, points[:, 0]) <= GRAM_ERROR


@pytest.mark.parametrize("N", [3, 32, 128, 1000])
@pytest.mark.parametrize("D", [1, 4096, 4097, 10**6, 10**8])
@pytest.mark.parametrize("B", [1, 64])
def test_stretches_cover_the_columns_and_fit_the_memory(B, N, D):
    width, parts = gpu.stretches(B, N, D)
    assert (parts - 1) * width < D <= parts * width
    assert width % 1024 == 0
    assert parts == 1 or B * parts * N * N <= gpu.PARTIAL_SUMS


def test_strided_rows_give_the_same_bits():
    points, a = cloud(2, 5, 77, dtype=torch.float32), cloud(2, 5)
    centre = points[:, 1]
    gram, x = centred_gram(points, centre), combine(points, a, centre)
    wider = torch.full((2, 5, 3, 100), torch.nan)
    wider[:, :, 1, 11:88] = points
    for view in (wider[:, :, 1, 11:88], points.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(centred_gram(view, centre), gram)
        assert torch.equal(combine(view, a, view[:, 1]), x)


@pytest.mark.parametrize("N", [7, 70])
def test_rows_too_large_or_too_small_to_be_squared_in_float32(N):
    """Rows of ordinary size beside 1e30, 1e-30 and denormal ones: every entry keeps its relative accuracy."""
    sizes = torch.ones(N, dtype=F64)
    sizes[[1, 2, 4, 6]] = torch.tensor([1e30, 1e-30, 1e-42, 0], dtype=F64)
    sizes[N - 2] = 1e35
    points = (cloud(1, N, 140) * sizes[:, None]).float()
    gram = centred_gram(points)
    assert gram.isfinite().all()
    assert gram_error(gram, points, None) <= GRAM_ERROR


def test_a_row_that_is_large_in_one_place_only():
    points = cloud(1, 4, 200, dtype=torch.float32)
    points[0, 2] = 0
    points[0, 2, 130] = 1e25
    points[0, 3, :100] *= 1e-25
    assert gram_error(centred_gram(points), points, None) <= GRAM_ERROR


@pytest.mark.parametrize(("bad", "N"), [(torch.nan, 6), (torch.inf, 6), (-torch.inf, 6), (torch.nan, 65)])
def test_a_row_that_is_not_finite_spoils_no_other(bad, N):
    points = cloud(1, N, 70, dtype=torch.float32)
    clean = centred_gram(points, points[:, 0])
    points[0, 3, 55] = bad
    gram = centred_gram(points, points[:, 0])
    others = torch.tensor([i for i in range(N) if i != 3])
    assert torch.equal(gram[:, others][:, :, others], clean[:, others][:, :, others])
    assert not gram[0, 3, 3].isfinite()
    a = torch.zeros(1, N, dtype=F64)
    a[0, [0, 1, 4]] = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    assert combine(points, a).isfinite().all()  # the bad row has no part in it


def test_what_is_not_finite_in_a_centre_counts_as_zero():
    points, centre = cloud(1, 5, 99, dtype=torch.float32), cloud(1, 99, dtype=torch.float32)
    holes = centre.clone()
    centre[0, [3, 98]] = 0
    holes[0, 3], holes[0, 98] = torch.nan, torch.inf
    assert torch.equal(centred_gram(points, holes), centred_gram(points, centre))
    a = cloud(1, 5)
    assert torch.equal(combine(points, a, holes), combine(points, a, centre))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_coefficient_of_one_copies_its_row(dtype):
    points = cloud(2, 4, 130).to(dtype)
    points[0, 1] = torch.nan
    points[0, 2, 5] = -0.0
    points[0, 2, 6] = torch.nan
    a = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=F64)
    got = combine(points, a, points[:, 3])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), torch.stack([points[0, 2], points[1, 0]]).view(bits))


def test_equal_rows_are_at_no_distance_whatever_block_they_are_in():
    points = cloud(1, 70, 50, dtype=torch.float32)
    points[0, [3, 66, 69]] = points[0, 20].clone()
    gram = centred_gram(points, points[:, 0])[0]
    for i in (3, 66, 69):
        assert torch.equal(gram[i], gram[20])


def test_nothing_to_read():
    assert centred_gram(torch.ones(2, 3, 0)).tolist() == [[[0.0] * 3] * 3] * 2
    assert centred_gram(torch.ones(0, 3, 5)).shape == (0, 3, 3)
    assert combine(torch.ones(0, 3, 5), torch.ones(0, 3, dtype=F64)).shape == (0, 5)


# ----------------------------------------------------------------------------------------------- the problem between


def problems():
    """Outliers to 1e4, duplicates, lines, weights over seven orders of magnitude and of zero; three at a time."""
    for trial in range(12):
        N, D = 1 + (5 * trial) % 18, 1 + trial % 7
        points = cloud(3, N, D, seed=trial)
        if trial % 3 == 0:
            points[:, : max(1, N // 4)] = points[:, -1:].clone()
        if trial % 4 == 1:
            points = points[:, :, :1] * cloud(3, 1, D, seed=99)
        points[:, : N // 3] *= 10.0 ** (trial % 5)
        weights = (torch.rand(3, N, generator=torch.Generator().manual_seed(trial), dtype=F64) * 16 - 8).exp()
        if trial % 2:
            weights = torch.ones(3, N, dtype=F64)
        if trial % 5 == 4:
            weights[:, N // 2 :: 3] = 0
            weights[:, 0] = 1
        yield points, weights


def agree(points, weights, *, tol=1e-6, max_steps=100):
    gram = points @ points.mT
    wanted = solve(gram, weights, tol=tol, max_steps=max_steps, resolution=2.0**-52)
    device = (x.to(DEVICE) for x in (gram, weights))
    got = [x.cpu() for x in gpu_solve.solve(*device, tol, max_steps, 2.0**-52)]
    coefficients, gap, status, around = got
    assert torch.equal(status, wanted.status)
    x, other = ((a[:, :, None] * points).sum(1) for a in (coefficients, wanted.coefficients))
    f, best = ((weights * (points - place[:, None]).norm(dim=2)).sum(1) for place in (x, other))
    assert ((f - best).abs() <= (wanted.gap + gap + 1e-13) * best).all()
    assert_close(x, other, atol=1e-6, rtol=0)  # where f is flat the rounding of float64 leaves half the digits
    assert_close(gap, wanted.gap, atol=1e-12, rtol=1e-3)
    # Around the best point, of which there may be two as good: the distances are the same.
    distances, others = distances_squared(around), distances_squared(wanted.gram)
    assert_close(distances, others, atol=1e-13 * others.max().item(), rtol=0)
    return wanted.status


def test_solves_what_torch_solves():
    seen = torch.cat([agree(points, weights) for points, weights in problems()])
    assert set(seen.tolist()) == {CONVERGED, ANCHOR, COLLINEAR}


def test_stopped_early_it_says_so_with_the_same_bound():
    points, weights = cloud(3, 12, 5, seed=3), torch.ones(3, 12, dtype=F64)
    points[:, :4] += 50
    assert (agree(points, weights, max_steps=0) == MAX_ITER).any()
    assert (agree(points, weights, max_steps=1) != MAX_ITER).any()


@pytest.mark.parametrize("excess", [1e-1, 1e-5])
def test_a_median_just_off_a_point_is_found(excess):
    others = cloud(1, 8, 3, seed=5)
    pull = (others / others.norm(dim=2, keepdim=True)).sum(1).norm().item()
    points = torch.cat([torch.zeros(1, 1, 3, dtype=F64), others], 1)
    weights = torch.ones(1, 9, dtype=F64)
    for factor, wanted in ((1 - excess, CONVERGED), (1 + excess, ANCHOR)):
        weights[0, 0] = pull * factor
        assert agree(points, weights).tolist() == [wanted]


def test_a_problem_of_more_rows_than_are_met_at_a_time():
    assert agree(cloud(1, 33, 9, seed=33), torch.ones(1, 33, dtype=F64), max_steps=2).tolist() == [CONVERGED]


def test_more_points_than_a_program_takes_go_to_torch():
    points, weights = cloud(1, gpu_solve.LARGEST + 1, 5), torch.ones(1, gpu_solve.LARGEST + 1, dtype=F64)
    agree(points, weights)


def test_the_parts_together_are_the_median(monkeypatch):
    """The op, its parts replaced by the kernels: what a GPU runs."""
    from anabranch_kernels.geometric_median import op

    monkeypatch.setattr(op, "_gram", gpu.centred_gram)
    monkeypatch.setattr(op, "_combine", gpu.combine)
    monkeypatch.setattr(op, "_solve", gpu_solve.solve)
    points = cloud(3, 6, 90, dtype=torch.float32)
    points[1, 2:] = points[1, :1]
    points[2, 0] = 1e30
    weights = torch.ones(3, 6, dtype=F64)
    result = op._median(points.to(DEVICE), weights.to(DEVICE), None, False, 1e-6, 100)
    point, _, gap, status, *_ = (x.cpu() for x in result)
    wanted = geometric_median(points, weights)
    assert torch.equal(status, wanted.status)
    assert (gap <= 1e-6).all()
    assert torch.equal(point[1], points[1, 0])
    assert_close(point, wanted.point, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ on a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 8, 32, 64, 100, 200])
@pytest.mark.parametrize("D", [300_007, 1 << 20])
def test_on_the_gpu_long_rows(N, D, dtype):
    points = torch.randn(2, N, D, device="cuda").to(dtype)
    gram = gpu.centred_gram(points, points[:, 0])
    wanted = reference.centred_gram(points, points[:, 0])
    norms = wanted.diagonal(dim1=1, dim2=2).sqrt()
    allowed = (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-300)
    assert ((gram - wanted).abs() / allowed).max() <= GRAM_ERROR
    assert torch.equal(gram, gpu.centred_gram(points, points[:, 0]))
    result = geometric_median(points)
    f = (points.double() - result.point.double()[:, None]).norm(dim=2).sum(1)
    mean = (points.double() - points.double().mean(1, keepdim=True)).norm(dim=2).sum(1)
    assert (f <= mean * (1 + resolution(dtype))).all()
    assert (result.gap_rel <= 1e-6).all()


@pytest.mark.gpu
def test_on_the_gpu_offsets_beyond_32_bits():
    points = torch.randn(1, 40, 60_000_000, device="cuda", dtype=torch.bfloat16)
    gram = gpu.centred_gram(points, points[:, 0])
    last = points[:, -3:]
    wanted = reference.centred_gram(last, points[:, 0])
    block = gram[:, -3:, -3:]
    assert_close(block, wanted, rtol=1e-5, atol=1e-5 * wanted.diagonal(dim1=1, dim2=2).max().item())
    a = torch.zeros(1, 40, dtype=F64, device="cuda")
    a[0, -1] = 1
    assert torch.equal(gpu.combine(points, a, points[:, 0]), points[:, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("N", [5, 16, 20, 32, 60, 128])
def test_on_the_gpu_many_problems_are_solved_side_by_side(N):
    for seed in range(4):
        points = cloud(64, N, 1 + seed * 4, seed=seed)
        points[:, : N // 3] *= 10.0**seed
        points[::3, : max(1, N // 4)] = points[::3, -1:].clone()
        agree(points, torch.ones(64, N, dtype=F64))


@pytest.mark.gpu
def test_on_the_gpu_opcheck_and_compile():
    points = torch.randn(2, 6, 40, device="cuda")
    weights = torch.rand(2, 6, device="cuda", dtype=F64)
    ops = torch.ops.anabranch
    torch.library.opcheck(ops.centred_gram.default, (points, points[:, 0]))
    torch.library.opcheck(ops.combine.default, (points, weights, points[:, 1]))
    gram = ops.centred_gram(points, None)
    torch.library.opcheck(ops.geometric_median_solve.default, (gram, weights, 1e-6, 100, 2.0**-23))
    torch.library.opcheck(ops.geometric_median.default, (points, weights, None, False, 1e-6, 100))
    compiled = torch.compile(lambda p: geometric_median(p).point, fullgraph=True)
    assert torch.equal(compiled(points), geometric_median(points).point)
