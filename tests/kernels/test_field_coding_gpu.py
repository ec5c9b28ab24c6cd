"""The Triton kernels of coding over fields against Python's integers; interpreted on a CPU where there is no GPU.

Every comparison is of all bits. Sizes cross the borders: tiles of 16 rows, blocks of 64 columns, the 512 bytes of a
column that stay in shared memory.
"""

import random

import pytest
import torch

from anabranch_kernels.field_coding import op, reference
from anabranch_kernels.field_coding.code import Code
from anabranch_kernels.field_coding.fields import BABYBEAR, F50, FIELDS, GOLDILOCKS, KOALABEAR, M31, FixedPoint

pytest.importorskip("triton")
from anabranch_kernels.field_coding import gpu, gpu_multiply, gpu_project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_field = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))


def elements(shape, field, seed=0):
    """Random ones, a third of them where carries, signs and digits turn over."""
    centre = sum(128 << (8 * i) for i in range(field.bytes))
    p = field.p
    edges = [x % p for x in (0, 1, 127, 128, 255, (p - 1) // 2, (p + 1) // 2, centre - 1, centre, 2**32 - 1, -1)]
    chance = random.Random(seed)
    count = torch.Size(shape).numel()
    values = [chance.choice(edges) if chance.random() < 1 / 3 else chance.randrange(p) for _ in range(count)]
    return op.matrix_of([values], field, torch.device("cpu")).view(shape)


def check(matrix, x, field):
    got = gpu.multiply(matrix.to(DEVICE), x.to(DEVICE), field.name)
    assert got.dtype == field.dtype
    assert torch.equal(got.cpu(), reference.multiply(matrix, x, field.name))


@every_field
@pytest.mark.parametrize(("M", "U", "L"), [(1, 1, 1), (20, 48, 130), (2, 66, 66), (17, 130, 65)])
def test_products_equal_the_reference(field, M, U, L):
    check(elements((M, U), field, 1), elements((U, L), field, 2), field)


@every_field
@pytest.mark.parametrize("value", ["largest", "centre"])
def test_sums_of_the_largest_digits_do_not_overflow(field, value):
    """All terms equal, so that sums of digits go as far from zero as they can."""
    number = field.p - 1 if value == "largest" else sum(128 << (8 * i) for i in range(field.bytes)) % field.p
    fill = op.matrix_of([[number] * 128], field, torch.device("cpu"))
    check(fill, fill.expand(3, 128).T, field)


@pytest.mark.parametrize("field", [BABYBEAR, GOLDILOCKS, F50], ids=lambda field: field.name)
def test_programs_walk_over_several_blocks_of_aligned_columns(field):
    check(elements((18, 7), field, 3), elements((7, 64 * 7 + 8), field, 4), field)


@pytest.mark.parametrize("field", [M31, GOLDILOCKS], ids=lambda field: field.name)
def test_strides_do_not_matter(field):
    matrix, x = elements((9, 20), field, 5), elements((90, 9), field, 6)
    check(matrix[:, ::2], x.T[:, 5:].T[:10], field)
    check(matrix.T[:9], x.T[:, :9].T, field)
    check(elements((30, 3), field).T, elements((64, 30), field).T, field)
    wide = elements((5, 80), field, 7)
    check(matrix[:, :5], wide[:, 1:70], field)  # rows begin anywhere
    check(matrix[:, :5], wide[:, 16:48], field)


@every_field
@pytest.mark.parametrize(("M", "U", "L"), [(3, 1025, 5), (9, 1100, 1)])
def test_projections_of_long_rows(field, M, U, L):
    check(elements((M, U), field, 8), elements((U, L), field, 9), field)


def test_projections_take_columns_and_rows_of_any_stride():
    check(elements((1100, 3), M31, 8).T, elements((2, 1100), M31, 9).T, M31)


@pytest.mark.parametrize("field", [BABYBEAR, GOLDILOCKS], ids=lambda field: field.name)
def test_longer_sums_than_a_kernel_takes_are_cut(field, monkeypatch):
    monkeypatch.setattr(gpu, "MOST", 50)
    check(elements((3, 170), field, 10), elements((170, 40), field, 11), field)


def test_shares_of_a_projection_are_added_up():
    matrix, x = elements((2, 3000), KOALABEAR, 12), elements((3000, 2), KOALABEAR, 13)
    parts = gpu_project.project(matrix.to(DEVICE), x.to(DEVICE), KOALABEAR).cpu()
    assert len(parts) > 1
    whole = reference.elements(reference.integers(parts).sum(0), KOALABEAR, torch.device("cpu"))
    assert torch.equal(whole, reference.multiply(matrix, x, "koalabear"))


def test_more_columns_than_can_be_counted_are_refused():
    x = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE).expand(1, 2**31)
    with pytest.raises(ValueError, match=r"U and L below 2147482624, got U=1, L=2147483648"):
        gpu.multiply(x[:, :1], x, "m31")


@every_field
@pytest.mark.parametrize(("M", "U", "L"), [(0, 3, 4), (2, 0, 3), (2, 3, 0)])
def test_empty_products(field, M, U, L):
    check(elements((M, U), field), elements((U, L), field), field)


@pytest.mark.parametrize("field", [BABYBEAR, KOALABEAR, GOLDILOCKS], ids=lambda field: field.name)
def test_the_transform_is_the_product(field):
    code = Code(field=field, clients=6, blocks=2, privacy=1)
    values = elements((3, 9), field, 14)
    arguments = code.clients, code.order, code.coset_order, field.name
    got = gpu.transform(values.to(DEVICE), *arguments)
    assert torch.equal(got.cpu(), reference.transform(values, *arguments))


@every_field
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dithered", [False, True])
def test_quantising_equals_the_reference(field, dtype, dithered):
    settings = FixedPoint(clip=1.25, fraction_bits=21)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700, generator=chance, dtype=torch.float64)
    edges = [0.0, -0.0, 1.25, -1.25, 1.3, -9e9, 2.5 * 2**-21, -3.5 * 2**-21, 2**-22, -(2**-22), 1e-300, torch.nan,
             torch.inf, -torch.inf]  # fmt: skip
    x[1, : len(edges)] = torch.tensor(edges, dtype=torch.float64)
    x = x.to(dtype)[:, ::2] if dithered else x.to(dtype)
    dither = torch.rand(x.shape, generator=chance, dtype=torch.float64) if dithered else None
    arguments = field.name, settings.clip, settings.fraction_bits
    out, counts = gpu.quantise(x.to(DEVICE), dither if dither is None else dither.to(DEVICE), *arguments)
    wanted, wanted_counts = reference.quantise(x, dither, *arguments)
    assert torch.equal(out.cpu(), wanted)
    assert torch.equal(counts.cpu(), wanted_counts)


@pytest.mark.parametrize("field", [GOLDILOCKS, F50], ids=lambda field: field.name)
@pytest.mark.parametrize("fraction_bits", [15, 20])
def test_numbers_without_a_fraction_stay_as_they_are(field, fraction_bits):
    """Where 2^52 would round: integers of up to 2^48 here, with and without halves, and up to 2^62."""
    clip = 2.0 ** (48 - fraction_bits) if field is F50 else 2.0 ** (62 - fraction_bits)
    x = (torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1) * clip
    x[:4] = torch.tensor([clip, -clip, 2.0**32 + 0.5 * 2.0**-fraction_bits, 2.0**-fraction_bits * 1.5])
    out, counts = gpu.quantise(x.to(DEVICE), None, field.name, clip, fraction_bits)
    wanted, wanted_counts = reference.quantise(x, None, field.name, clip, fraction_bits)
    assert torch.equal(out.cpu(), wanted)
    assert torch.equal(counts.cpu(), wanted_counts)


@every_field
def test_dequantising_equals_the_reference(field):
    x = elements((5, 401), field, 15)
    for part, divisor in ((x, 1.0), (x[:, ::3], 37.0 * 2**20), (x[:0], 3.0)):
        got = gpu.dequantise(part.to(DEVICE), field.name, divisor)
        assert torch.equal(got.cpu(), reference.dequantise(part, field.name, divisor))


@every_field
@pytest.mark.parametrize("words", [0, 1, 1024, 2500])
def test_accepted_words_keep_their_order(field, words):
    chance = torch.Generator().manual_seed(2)
    stream = torch.randint(0, 256, (words * field.bytes + 1,), generator=chance, dtype=torch.uint8)
    stream[1:].view(words, field.bytes)[::3] = 255  # too large in every field
    for part in (stream[1:], stream[1:].clone(), stream[1:].repeat_interleave(2)[::2]):
        got = gpu.accept(part.to(DEVICE), field.name)
        assert torch.equal(got.cpu(), reference.accept(part.clone(), field.name))
        assert len(got) <= words * 2 // 3


@every_field
def test_a_resident_column_fits_and_its_digits_leave_room_for_two_programs(field):
    for U in range(1, gpu_multiply.RESIDENT // field.bytes + 1):
        for M, align in ((1, 1), (16, 4), (17, 1), (200, 4)):
            constants = gpu_multiply.plan(M, U, align, field).constants
            assert constants["BU"] >= U
            assert constants["D"] ** 2 * constants["BM"] * constants["BU"] <= 64 * 1024


def on_gpu(shape, field, seed):
    """Uniform elements, made on the GPU; for Goldilocks from words of 62 bits and the upper end of the field."""
    chance = torch.Generator("cuda").manual_seed(seed)
    x = torch.randint(min(field.p, 2**62), shape, generator=chance, device="cuda", dtype=field.dtype)
    return torch.where(x % 3 == 0, field.p - 2**64 - 1 - x, x) if field is GOLDILOCKS else x


@pytest.mark.gpu
@every_field
@pytest.mark.parametrize(
    ("M", "U", "L"),
    [(64, 48, 100_000), (64, 48, 99_999), (128, 96, 50_001), (1, 100, 65_537), (200, 300, 2_000), (64, 100_000, 4)],
)
def test_on_the_gpu_products_equal_the_cpu(field, M, U, L):
    matrix, x = on_gpu((M, U), field, 0), on_gpu((U, L), field, 1)
    assert torch.equal(op.multiply(matrix, x, field).cpu(), op.multiply(matrix.cpu(), x.cpu(), field))


@pytest.mark.gpu
@pytest.mark.parametrize("field", [BABYBEAR, GOLDILOCKS], ids=lambda field: field.name)
def test_on_the_gpu_results_repeat_and_offsets_go_beyond_32_bits(field):
    rows = 2**31 // 1_000_000 + 2  # more than 2^31 elements
    x = on_gpu((rows, 1_000_000), field, 2)
    matrix = on_gpu((3, rows), field, 3)
    first = op.multiply(matrix, x, field)
    assert all(torch.equal(op.multiply(matrix, x, field), first) for _ in range(3))
    some = slice(999_000, None)
    assert torch.equal(first[:, some].cpu(), op.multiply(matrix.cpu(), x[:, some].cpu(), field))


@pytest.mark.gpu
@every_field
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu_conversions_equal_the_cpu(field, dtype):
    settings = FixedPoint(clip=1.0, fraction_bits=20)
    chance = torch.Generator("cuda").manual_seed(4)
    x = torch.randn(1_000_003, generator=chance, device="cuda", dtype=torch.float64)
    dither = torch.rand(x.shape, generator=chance, device="cuda", dtype=torch.float64)
    for noise in (None, dither):
        mine, clipped = op.quantise(x.to(dtype), field, settings, dither=noise)
        wanted = op.quantise(x.to(dtype).cpu(), field, settings, dither=None if noise is None else noise.cpu())
        assert torch.equal(mine.cpu(), wanted[0])
        assert clipped == wanted[1]
    back = op.dequantise(mine, field, settings, total_weight=3)
    assert torch.equal(back.cpu(), op.dequantise(mine.cpu(), field, settings, total_weight=3))
    stream = torch.randint(0, 256, (field.bytes * 1_000_001,), generator=chance, device="cuda", dtype=torch.uint8)
    assert torch.equal(op.accept(stream, field).cpu(), op.accept(stream.cpu(), field))


@pytest.mark.gpu
def test_on_the_gpu_opcheck_and_compile():
    matrix, x = on_gpu((5, 9), BABYBEAR, 5), on_gpu((9, 33), BABYBEAR, 6)
    torch.library.opcheck(torch.ops.anabranch.field_multiply.default, (matrix, x, "babybear"))
    compiled = torch.compile(lambda a, b: op.multiply(a, b, BABYBEAR), fullgraph=True)
    assert torch.equal(compiled(matrix, x), op.multiply(matrix, x, BABYBEAR))
