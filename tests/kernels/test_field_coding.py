"""Field coding: every instruction set against Python's integers, the code's theorems, privacy, golden vectors."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch_kernels.field_coding import cpu, op, reference
from anabranch_kernels.field_coding.code import Code, correct, decoding_matrix, encoding_matrix
from anabranch_kernels.field_coding.fields import BABYBEAR, F50, FIELDS, GOLDILOCKS, KOALABEAR, M31, Field, FixedPoint
from anabranch_kernels.field_coding.op import (
    accept,
    decode,
    dequantise,
    encode,
    is_canonical,
    matrix_of,
    multiply,
    quantise,
)

ISAS = cpu.ISAS
ALL = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
TRANSFORMS = (BABYBEAR, KOALABEAR, GOLDILOCKS)
EVERY = tuple(FIELDS.values())
TOY = Field(name="toy", p=17, generator=3, two_adicity=1, dtype=torch.int32)
GOLDEN = Path(__file__).parent / "golden" / "field_coding.json"


def elements(field, *shape, seed=0, boundary=False):
    """Uniform elements, or a mixture of those at the boundaries of a field and of its sums."""
    draw = random.Random(seed)
    edges = (0, 1, 2, (field.p - 1) // 2, (field.p + 1) // 2, field.p - 2, field.p - 1, 2**32 % field.p)
    numbers = [draw.choice(edges) if boundary else draw.randrange(field.p) for _ in range(int(np.prod(shape)))]
    return reference.elements(np.array(numbers, dtype=object).reshape(shape), field, torch.device("cpu"))


def full(field, *shape):
    """Nothing but p - 1: the sums that would overflow first."""
    return matrix_of([[field.p - 1]], field, torch.device("cpu")).expand(*shape).contiguous()


def integers_of(x):
    return reference.integers(x).tolist()


def code_word(code, seed=0):
    """K + T random numbers, and one share of them for each client."""
    draw = random.Random(seed)
    values = [draw.randrange(code.field.p) for _ in range(code.threshold)]
    return values, [
        sum(g * x for g, x in zip(row, values, strict=True)) % code.field.p for row in encoding_matrix(code)
    ]


# ------------------------------------------------------------------------------------------------------------ products


@st.composite
def products(draw):
    field = draw(st.sampled_from(list(FIELDS.values())))
    M, U = draw(st.integers(0, 9)), draw(st.integers(0, 9) | st.sampled_from([33, 100]))
    L = draw(st.integers(0, 5) | st.sampled_from([15, 16, 17, 31, 33, 64, 65, 130]))
    seed, boundary = draw(st.integers(0, 2**16)), draw(st.booleans())
    matrix, x = elements(field, M, U, seed=seed, boundary=boundary), elements(field, U, L, seed=seed + 1)
    matrix = matrix.T.contiguous().T if draw(st.booleans()) else matrix
    layout = draw(st.sampled_from(["rows", "columns", "every second"]))
    if layout == "columns":
        x = x.T.contiguous().T
    elif layout == "every second":
        x = torch.stack([x, x], 2).flatten(1)[:, ::2]
    return field, matrix, x


@given(products())
@settings(max_examples=150)
def test_products_equal_pythons_in_every_instruction_set(case):
    field, matrix, x = case
    wanted = reference.multiply(matrix, x, field.name)
    for isa in ISAS:
        assert torch.equal(cpu.multiply(matrix, x, field.name, isa), wanted), isa


@ALL
@pytest.mark.parametrize(("M", "L"), [(1, 20), (3, 17), (6, 33), (2, 3)], ids=str)
def test_sums_of_any_length_do_not_overflow(field, M, L):
    """Around the 512, 2048 and 4096 terms after which sums are reduced, of the largest products there are."""
    for U in (511, 512, 513, 2049, 4095, 4096, 4097, 9000):
        total = U * (field.p - 1) ** 2 % field.p
        wanted = matrix_of([[total]], field, torch.device("cpu")).expand(M, L)
        for isa in ISAS:
            assert torch.equal(cpu.multiply(full(field, M, U), full(field, U, L), field.name, isa), wanted), (isa, U)


@ALL
def test_projections_of_long_rows_equal_a_product_with_their_transpose(field, threads):
    """Lanes along the sum, several slabs, several tasks: against the kernel whose lanes are columns."""
    threads(2)
    shares, rho = elements(field, 5, 300_000 // 5, seed=1).repeat(1, 5), full(field, 4, 300_000)
    rho[1, ::3], rho[2, 1::7], rho[3] = 1, 0, shares[0]
    wanted = multiply(shares[:, :].contiguous(), torch.cat([rho, rho, rho, rho, rho]).T.contiguous(), field)[:, :4]
    for isa in ISAS:
        assert torch.equal(cpu.multiply(shares, rho.T, field.name, isa), wanted), isa
    exact = sum(a * b for a, b in zip(integers_of(shares[1]), integers_of(rho[3]), strict=True)) % field.p
    assert reference.integers(wanted)[1, 3] == exact


def test_sums_of_thousands_wrap_in_64_bits_but_not_here():
    """LightSecAgg's reference sums int64 products modulo 2^31 - 1 and reduces at the end: wrong from three terms on."""
    matrix, x = elements(M31, 20, 10, seed=1), elements(M31, 10, 500, seed=2)
    right = reference.multiply(matrix, x, "m31")
    with np.errstate(over="ignore"):
        wrapping = (matrix.numpy().astype(np.int64) @ x.numpy().astype(np.int64)) % M31.p
    assert np.mean(wrapping != right.numpy()) > 0.8
    for isa in ISAS:
        assert torch.equal(cpu.multiply(matrix, x, "m31", isa), right)


@pytest.mark.slow
@ALL
def test_millions_of_products_are_exact(field):
    """Every element alike in all instruction sets, and their sum with random weights as Python's integers have it."""
    M, U, L = 32, 24, 1 << 16
    seeded = torch.Generator().manual_seed(3)
    stream = torch.randint(0, 256, ((M + L) * U * field.bytes * 2,), dtype=torch.uint8, generator=seeded)
    uniform = accept(stream, field)
    matrix, x = uniform[: M * U].view(M, U), uniform[M * U : M * U + U * L].view(U, L).clone()
    x[:, ::5] = full(field, U, 1)
    first, *others = (cpu.multiply(matrix, x, field.name, isa) for isa in ISAS)
    assert all(torch.equal(first, other) for other in others)
    draw = random.Random(1)
    weights = np.array([draw.randrange(field.p) for _ in range(L)], dtype=object)
    of_x = np.array([sum(row * weights) % field.p for row in reference.integers(x)], dtype=object)
    for row, product in zip(reference.integers(matrix), reference.integers(first), strict=True):
        assert sum(row * of_x) % field.p == sum(product * weights) % field.p


def test_threads_share_the_work_and_not_the_result(threads):
    matrix, x = elements(BABYBEAR, 7, 9), elements(BABYBEAR, 9, 9000)
    stream = torch.randint(0, 256, (600_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    numbers = torch.linspace(-2, 2, 200_001)
    fixed = FixedPoint(clip=1.0, fraction_bits=20)
    code = Code(field=BABYBEAR, clients=16, blocks=6, privacy=3)
    results = []
    for count in (1, 3):
        threads(count)
        quantised, clipped = quantise(numbers, BABYBEAR, fixed)
        results.append(
            [multiply(matrix, x, BABYBEAR), encode(x, code, method="transform"), accept(stream, BABYBEAR), quantised,
             dequantise(quantised, BABYBEAR, fixed), torch.tensor(clipped)]
        )  # fmt: skip
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------------------ the code


@st.composite
def codes(draw, fields=EVERY, most=64):
    N = draw(st.integers(3, most))
    T = draw(st.integers(1, N - 1))
    return Code(field=draw(st.sampled_from(fields)), clients=N, blocks=draw(st.integers(1, N - T)), privacy=T)


@given(codes(), st.integers(0, 40), st.integers(0, 2**16), st.booleans())
@settings(max_examples=40)
def test_any_sufficient_shares_give_the_data_back(code, L, seed, boundary):
    values = elements(code.field, code.threshold, L, seed=seed, boundary=boundary)
    shares = encode(values, code)
    assert torch.equal(shares, encode(values, code, method="dense"))
    clients = random.Random(seed).sample(range(code.clients), code.threshold)
    assert torch.equal(decode(shares[clients], clients, code), values[: code.blocks])
    assert is_canonical(shares, code.field)


@ALL
def test_every_subset_of_few_clients_decodes(field):
    for N, K, T in [(3, 1, 1), (5, 2, 2), (6, 3, 1), (8, 4, 2), (8, 1, 7), (8, 5, 3)]:
        code = Code(field=field, clients=N, blocks=K, privacy=T)
        values = elements(field, K + T, 5, seed=N)
        shares = encode(values, code)
        for clients in itertools.combinations(range(N), K + T):
            assert torch.equal(decode(shares[list(clients)], clients, code), values[:K])


@given(codes(TRANSFORMS), st.integers(0, 70), st.integers(0, 2**16), st.booleans())
@settings(max_examples=40)
def test_the_transform_equals_the_matrix_in_every_instruction_set(code, L, seed, boundary):
    values = elements(code.field, code.threshold, L, seed=seed, boundary=boundary)
    dense = reference.multiply(matrix_of(encoding_matrix(code), code.field, values.device), values, code.field.name)
    for isa in ISAS:
        got = cpu.transform(values, code.clients, code.order, code.coset_order, code.field.name, isa)
        assert torch.equal(got, dense), isa


@pytest.mark.parametrize("field", TRANSFORMS, ids=lambda field: field.name)
def test_large_transforms_equal_the_naive_sums(field):
    code = Code(field=field, clients=200, blocks=70, privacy=30)
    values = elements(field, 100, 3)
    sizes = (code.clients, code.order, code.coset_order)
    assert torch.equal(encode(values, code, method="transform"), reference.transform(values, *sizes, field.name))


def determinant(rows, p):
    """By elimination modulo p."""
    rows, result = [list(row) for row in rows], 1
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i] % p), None)
        if pivot is None:
            return 0
        rows[i], rows[pivot] = rows[pivot], rows[i]
        result = result * rows[i][i] * (1 if pivot == i else -1) % p
        inverse = pow(rows[i][i], -1, p)
        for r in range(i + 1, len(rows)):
            factor = rows[r][i] * inverse % p
            rows[r] = [(x - factor * y) % p for x, y in zip(rows[r], rows[i], strict=True)]
    return result % p


@ALL
def test_no_minor_of_the_noise_part_vanishes(field):
    """So any T shares hide the data: theirs is an invertible matrix times uniform noise, plus something."""
    for N, K, T in [(6, 2, 2), (8, 3, 3), (10, 4, 4)]:
        noise = [row[K:] for row in encoding_matrix(Code(field=field, clients=N, blocks=K, privacy=T))]
        for chosen in itertools.combinations(noise, T):
            assert determinant(chosen, field.p)
    code = Code(field=field, clients=32, blocks=16, privacy=8)
    noise = [row[16:] for row in encoding_matrix(code)]
    for seed in range(60):
        assert determinant(random.Random(seed).sample(noise, 8), field.p)


def law(code, data, clients):
    """How often each tuple of these clients' shares comes up over all noise."""
    p, matrix, seen = code.field.p, encoding_matrix(code), {}
    for noise in itertools.product(range(p), repeat=code.privacy):
        values = (*data, *noise)
        shares = tuple(sum(g * x for g, x in zip(matrix[j], values, strict=True)) % p for j in clients)
        seen[shares] = seen.get(shares, 0) + 1
    return seen


def test_t_shares_say_nothing_and_one_more_says_something():
    code = Code(field=TOY, clients=6, blocks=2, privacy=2)
    uniform = dict.fromkeys(itertools.product(range(17), repeat=2), 1)
    inputs = [(0, 0), (1, 0), (0, 1), (16, 16), (3, 11)]
    for clients in itertools.combinations(range(6), 2):
        assert all(law(code, data, clients) == uniform for data in inputs)
    for clients in itertools.combinations(range(6), 3):
        zero, first, second = (law(code, data, clients) for data in inputs[:3])
        assert zero != first  # one linear form of the data shows, and all of its coefficients differ from zero
        assert zero != second


@ALL
def test_points_of_clients_and_of_data_never_meet(field):
    """alpha_j = beta_k would hand block k to client j."""
    for N, K, T in [(3, 1, 1), (4, 2, 1), (5, 1, 4), (33, 16, 8), (64, 40, 20)]:
        code = Code(field=field, clients=N, blocks=K, privacy=T)
        assert len({*code.alpha, *code.beta}) == len(code.alpha) + len(code.beta)


# ------------------------------------------------------------------------------------------------------- wrong shares


@ALL
def test_up_to_e_wrong_shares_are_named_and_corrected(field):
    draw = random.Random(7)
    for N, K, T, E in [(5, 1, 2, 1), (7, 2, 2, 1), (16, 6, 4, 3), (32, 16, 8, 4), (40, 10, 5, 12)]:
        code = Code(field=field, clients=N, blocks=K, privacy=T)
        values, shares = code_word(code, seed=N)
        for wrong in range(E + 1):
            clients = sorted(draw.sample(range(N), draw.randint(K + T + 2 * E, N)))
            bad = sorted(draw.sample(clients, wrong))
            word = {j: shares[j] for j in clients}
            for j in bad:
                word[j] = (word[j] + draw.choice([1, field.p - 1, draw.randrange(1, field.p)])) % field.p
            assert correct(code, word, most_errors=E) == (values[:K], bad)


@ALL
def test_more_wrong_shares_than_e_are_refused_where_the_distance_tells(field):
    """Words of a code of n values and K + T unknowns differ in n - K - T + 1 places. F wrong values are further than E
    from the right word, and no nearer than n - K - T + 1 - F to another: so E < F < n - K - T + 1 - E is refused."""
    draw = random.Random(8)
    for N, K, T, E in [(9, 2, 2, 1), (16, 4, 3, 2), (32, 8, 4, 5)]:
        code = Code(field=field, clients=N, blocks=K, privacy=T)
        _, shares = code_word(code, seed=N)
        for wrong in range(E + 1, N - K - T + 1 - E):
            word = dict(enumerate(shares))
            for j in draw.sample(range(N), wrong):
                word[j] = (word[j] + draw.randrange(1, field.p)) % field.p
            assert correct(code, word, most_errors=E) is None


def test_a_wrong_word_near_another_word_is_taken_for_it():
    """The truth beyond the distance: enough wrong values that agree make a word of the code."""
    code = Code(field=M31, clients=7, blocks=2, privacy=2)
    (values, shares), (others, forged) = code_word(code, seed=1), code_word(code, seed=2)
    word = {j: forged[j] if j < 6 else shares[j] for j in range(7)}  # six of seven forge in concert
    assert correct(code, word, most_errors=1) == (others[:2], [6])
    assert values != others


def test_bad_words_get_a_clear_error():
    code = Code(field=BABYBEAR, clients=7, blocks=2, privacy=2)
    word = dict(enumerate(code_word(code)[1]))
    with pytest.raises(ValueError, match=r"values must be in 0\.\.2013265920, got 2013265921"):
        correct(code, {**word, 3: BABYBEAR.p}, most_errors=1)
    with pytest.raises(ValueError, match=r"2 errors need K \+ T \+ 2 \* errors = 8 values, got 7"):
        correct(code, word, most_errors=2)
    with pytest.raises(ValueError, match=r"need different clients of 0\.\.6"):
        correct(code, {**word, 7: 1}, most_errors=1)
    with pytest.raises(ValueError, match="takes the shares of K \\+ T = 4 clients, got 3"):
        decoding_matrix(code, [0, 1, 2])
    with pytest.raises(ValueError, match="need different clients"):
        decoding_matrix(code, [0, 1, 2, 2])


# --------------------------------------------------------------------------------------------------------- fixed point


@st.composite
def numbers(draw):
    field = draw(st.sampled_from(list(FIELDS.values())))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    clip = draw(st.sampled_from([1.0, 0.7, 3.25, 32.0]))
    most = (field.p - 1) // 2
    bits = draw(st.integers(0, max(b for b in range(60) if FixedPoint(clip=clip, fraction_bits=b).largest <= most)))
    finite = st.floats(-64, 64, width=16 if dtype in (torch.float16, torch.bfloat16) else 32)
    x = torch.tensor(draw(st.lists(finite, max_size=40)), dtype=torch.float64).to(dtype)
    return field, FixedPoint(clip=clip, fraction_bits=bits), x


@given(numbers(), st.booleans())
@settings(max_examples=150)
def test_fixed_point_equals_pythons_in_every_instruction_set(case, dithered):
    field, fixed, x = case
    dither = torch.linspace(0, 0.999, len(x), dtype=torch.float64) if dithered else None
    wanted, counts = reference.quantise(x, dither, field.name, fixed.clip, fixed.fraction_bits)
    back = reference.dequantise(wanted, field.name, 3 * 2.0**fixed.fraction_bits)
    for isa in ISAS:
        got = cpu.quantise(x, dither, field.name, fixed.clip, fixed.fraction_bits, isa)
        assert torch.equal(got[0], wanted), isa
        assert torch.equal(got[1], counts), isa
        assert torch.equal(cpu.dequantise(wanted, field.name, 3 * 2.0**fixed.fraction_bits, isa), back), isa


@given(numbers())
def test_rounding_errs_by_half_a_step_and_counts_what_it_clips(case):
    field, fixed, x = case
    out, clipped = quantise(x, field, fixed)
    back = dequantise(out, field, fixed)
    held = x.double().clamp(-fixed.clip, fixed.clip)
    assert clipped == int((x.double().abs() > fixed.clip).sum())
    # Half a step; float64 itself errs by 2^-53 of up to 32.
    assert bool(((back - held).abs() <= 2.0 ** -(fixed.fraction_bits + 1) + 2.0**-48).all())


def test_halves_round_to_even_and_dither_is_unbiased():
    fixed = FixedPoint(clip=10.0, fraction_bits=1)
    out, _ = quantise(torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, -1.25]), M31, fixed)
    assert integers_of(out) == [0, 2, 2, 0, M31.p - 2, M31.p - 2]
    dither = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    x = torch.full((1024,), -0.3)
    out, _ = quantise(x, M31, fixed, dither=dither)
    assert abs(dequantise(out, M31, fixed).mean().item() + 0.3) < 1 / 1024  # the grid of the dither, over two


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_refused(bad, dtype):
    for at in (0, 6, 16):
        x = torch.zeros(17, dtype=dtype)
        x[at] = bad
        for isa in ISAS:
            assert cpu.quantise(x, None, "m31", 1.0, 8, isa)[1].tolist()[1] == 1
        with pytest.raises(ValueError, match="1 of 17 numbers are not finite"):
            quantise(x, GOLDILOCKS, FixedPoint(clip=1.0, fraction_bits=20))


@ALL
def test_the_largest_weight_decodes_and_one_more_is_refused(field):
    fixed = FixedPoint(clip=1.5, fraction_bits=20)
    most = (field.p - 1) // 2 // fixed.largest
    fixed.check_budget(field, most)
    with pytest.raises(ValueError, match=f"at most a weight of {most} fits"):
        fixed.check_budget(field, most + 1)
    code = Code(field=field, clients=5, blocks=2, privacy=2)
    for x in (torch.full((6,), 1.5), torch.full((6,), -1.5), torch.tensor([1.5, -1.5, 9.0, -9.0, 0.0, 1.5])):
        out, _ = quantise(x, field, fixed)
        weights = matrix_of([[most - most // 2, most // 2]], field, torch.device("cpu"))
        shares = [encode(torch.cat([out.view(2, 3), elements(field, 2, 3, seed=seed)]), code) for seed in (1, 2)]
        sums = torch.cat([multiply(weights, torch.stack([share[j] for share in shares]), field) for j in (4, 0, 2, 1)])
        mean = dequantise(decode(sums, [4, 0, 2, 1], code), field, fixed, total_weight=most)
        assert torch.equal(mean.flatten(), x.double().clamp(-1.5, 1.5))


def test_budgets_that_one_number_exceeds_are_refused():
    with pytest.raises(ValueError, match="at most a weight of 0 fits"):
        quantise(torch.zeros(3), BABYBEAR, FixedPoint(clip=1024.0, fraction_bits=20))
    with pytest.raises(ValueError, match="x must be float64, float32, bfloat16 or float16"):
        quantise(torch.zeros(3, dtype=torch.int32), BABYBEAR, FixedPoint(clip=1.0, fraction_bits=20))


# ------------------------------------------------------------------------------------------------------------- streams


@ALL
def test_accepted_words_equal_pythons_in_every_instruction_set(field):
    random_bytes = torch.Generator().manual_seed(5)
    for words in (0, 1, 5, 8, 16, 31, 333):
        stream = torch.randint(0, 256, (words * field.bytes,), dtype=torch.uint8, generator=random_bytes)
        high = torch.randint(253, 256, (words * field.bytes,), dtype=torch.uint8, generator=random_bytes)
        edges = [field.p - 1, field.p, field.p + 1, 0, 2**field.bits - 1, 2 ** (8 * field.bytes) - 1]
        exact = b"".join((edges[i % 6] % 2 ** (8 * field.bytes)).to_bytes(field.bytes, "little") for i in range(words))
        for piece in (stream, high, torch.tensor(list(exact), dtype=torch.uint8)):
            wanted = reference.accept(piece, field.name)
            for isa in ISAS:
                assert torch.equal(cpu.accept(piece, field.name, isa), wanted), isa
    assert is_canonical(accept(torch.full((800,), 255, dtype=torch.uint8), field), field)


@ALL
def test_elements_from_p_on_are_not_canonical(field):
    good = matrix_of([[0, 1, field.p - 1, (field.p - 1) // 2]], field, torch.device("cpu"))
    assert is_canonical(good, field)
    assert is_canonical(good[:, :0], field)
    for number in (field.p, field.p + 1, 2 ** (8 * field.bytes) - 1, 2 ** (8 * field.bytes - 1)):
        bad = good.clone()
        bad[0, 2] = number - 2 ** (8 * field.bytes) if number >= 2 ** (8 * field.bytes - 1) else number
        assert is_canonical(bad, field) is (number < field.p)


# ------------------------------------------------------------------------------------------------------ golden vectors


def hexadecimal(x, field):
    """Little-endian bytes, as in messages."""
    return b"".join(int(number).to_bytes(field.bytes, "little") for number in np.array(x, dtype=object).ravel()).hex()


def golden_case(field):
    """Two owners' vectors from fixed seeds to the decoded sum, in Python's integers alone."""
    code = Code(field=field, clients=7, blocks=3, privacy=2)
    weights, clients, L, p = [3, 5], [6, 0, 4, 1, 3], 4, field.p
    draw, matrix = random.Random(f"golden {field.name}"), encoding_matrix(code)
    case = {"clients": 7, "blocks": 3, "privacy": 2, "clip": 1.0, "fraction_bits": 20, "weights": weights,
            "decoders": clients, "matrix": hexadecimal(matrix, field), "owners": []}  # fmt: skip
    sums = np.zeros((7, L), dtype=object)
    for weight in weights:
        numbers = [*(draw.randint(-(2**24), 2**24) / 2**23 for _ in range(3 * L - 3)), 1.5 * 2**-20, -1.0, 1.0]
        data = [round(min(max(x, -1.0), 1.0) * 2**20) % p for x in numbers]  # Python rounds halves to even
        noise = [draw.randrange(p) for _ in range(2 * L)]
        values = np.array(data + noise, dtype=object).reshape(5, L)
        shares = np.array(matrix, dtype=object) @ values % p
        sums = (sums + weight * shares) % p
        case["owners"].append(
            {"numbers": numbers, "data": hexadecimal(data, field), "noise": hexadecimal(noise, field),
             "shares": hexadecimal(shares, field)}
        )  # fmt: skip
    decoded = np.array(decoding_matrix(code, clients), dtype=object) @ sums[clients] % p
    return {**case, "sums": hexadecimal(sums, field), "decoded": hexadecimal(decoded, field)}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def parse(text, field, rows):
    """Elements [rows, -1] of hexadecimal bytes."""
    raw = np.frombuffer(bytes.fromhex(text), dtype=np.int32 if field.bytes == 4 else np.int64)
    return torch.from_numpy(raw.copy()).view(rows, -1)


@ALL
def test_golden_vectors_are_what_pythons_integers_make(field, golden):
    assert golden[field.name] == golden_case(field)


@ALL
@pytest.mark.parametrize("isa", ISAS)
def test_golden_vectors_are_what_every_instruction_set_makes(field, isa, golden):
    case = golden[field.name]
    code = Code(field=field, clients=case["clients"], blocks=case["blocks"], privacy=case["privacy"])
    matrix, all_shares = matrix_of(encoding_matrix(code), field, torch.device("cpu")), []
    assert torch.equal(matrix, parse(case["matrix"], field, 7))
    for owner in case["owners"]:
        numbers = torch.tensor(owner["numbers"], dtype=torch.float64)
        data, counts = cpu.quantise(numbers, None, field.name, case["clip"], case["fraction_bits"], isa)
        assert torch.equal(data.view(1, -1), parse(owner["data"], field, 1))
        assert int(counts[0]) == sum(abs(x) > 1 for x in owner["numbers"])
        values = torch.cat([data.view(3, -1), parse(owner["noise"], field, 2)])
        shares = cpu.multiply(matrix, values, field.name, isa)
        assert torch.equal(shares, parse(owner["shares"], field, 7))
        if code.has_transform:
            assert torch.equal(cpu.transform(values, 7, code.order, code.coset_order, field.name, isa), shares)
        all_shares.append(shares)
    weights = matrix_of([case["weights"]], field, torch.device("cpu"))
    sums = cpu.multiply(weights, torch.stack([shares.flatten() for shares in all_shares]), field.name, isa).view(7, -1)
    assert torch.equal(sums, parse(case["sums"], field, 7))
    back = matrix_of(decoding_matrix(code, case["decoders"]), field, torch.device("cpu"))
    decoded = cpu.multiply(back, sums[case["decoders"]], field.name, isa)
    assert torch.equal(decoded, parse(case["decoded"], field, 3))


# -------------------------------------------------------------------------------------------------------- registration


def samples(field):
    x, matrix = elements(field, 3, 5), elements(field, 2, 3)
    calls = {
        "field_multiply": (matrix, x, field.name),
        "field_quantise": (torch.rand(7), None, field.name, 1.0, 8),
        "field_dequantise": (x, field.name, 256.0),
        "field_accept": (torch.zeros(64, dtype=torch.uint8), field.name),
    }
    return calls | ({"field_transform": (x, 5, 4, 8, field.name)} if field in TRANSFORMS else {})


@pytest.mark.parametrize("field", [BABYBEAR, F50, GOLDILOCKS], ids=lambda field: field.name)
def test_the_registrations_are_sound(field):
    for name, arguments in samples(field).items():
        torch.library.opcheck(getattr(torch.ops.anabranch, name).default, arguments)


def test_ops_compile_into_one_graph(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)  # accept's size is its data's
    matrix, x = elements(BABYBEAR, 4, 3), elements(BABYBEAR, 3, 40)
    stream = torch.randint(0, 256, (400,), dtype=torch.uint8)

    def chain(matrix, x, stream):
        product = multiply(matrix, x, BABYBEAR)
        mean = dequantise(product, BABYBEAR, FixedPoint(clip=1.0, fraction_bits=4))
        shares = torch.ops.anabranch.field_transform(x, 4, 4, 4, "babybear")
        return product, mean, shares, op._quantise(mean, None, "babybear", 1.0, 4)[0], accept(stream, BABYBEAR)

    compiled = torch.compile(chain, fullgraph=True, backend="eager")(matrix, x, stream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, chain(matrix, x, stream), strict=True))


def test_bad_input_gets_a_clear_error():
    x = elements(BABYBEAR, 3, 4)
    code = Code(field=M31, clients=5, blocks=2, privacy=1)
    with pytest.raises(ValueError, match="cannot multiply"):
        multiply(x, x, BABYBEAR)
    with pytest.raises(ValueError, match=r"must be 2-dimensional torch\.int64 elements of goldilocks"):
        multiply(x, x.T, GOLDILOCKS)
    with pytest.raises(ValueError, match=r"values must be \[K \+ T = 3, L\]"):
        encode(elements(M31, 2, 4), code)
    with pytest.raises(ValueError, match="field m31 has no transform"):
        encode(elements(M31, 3, 4), code, method="transform")
    with pytest.raises(ValueError, match="method must be 'dense', 'transform' or None, got 'fast'"):
        encode(elements(M31, 3, 4), code, method="fast")
    with pytest.raises(ValueError, match=r"stream must be \[S\] uint8, S a multiple of 4"):
        accept(torch.zeros(6, dtype=torch.uint8), M31)
    with pytest.raises(ValueError, match="N >= K \\+ T"):
        Code(field=M31, clients=3, blocks=2, privacy=2)


if __name__ == "__main__":  # writes the golden vectors anew
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({name: golden_case(field) for name, field in FIELDS.items()}, indent=1) + "\n")
