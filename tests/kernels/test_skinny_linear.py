"""Skinny linear layers: every instruction set against float64 NumPy, rows that do not know of each other, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch_kernels.native import extension
from anabranch_kernels.skinny_linear import cpu, reference
from anabranch_kernels.skinny_linear.op import skinny_linear

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ISAS = extension.supported_isas()
if "avx512" in ISAS:
    ISAS.append("avx512_bf16_emulated")  # the paths of vdpbf16ps, its dot product spelt out


def layer(M, width, out, *, dtype=torch.float32, quantised=False, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    scales = None
    if quantised:
        weight = torch.randint(-127, 128, (out, width), generator=random, dtype=torch.int8)
        scales = torch.rand(out, generator=random) * 0.02 + 1e-3
    else:
        weight = torch.randn(out, width, generator=random).to(dtype)
    return {
        "x": torch.randn(M, width, generator=random).to(dtype),
        "weight": weight,
        "bias": torch.randn(out, generator=random).to(dtype) if bias else None,
        "scales": scales,
    }


def assert_right(got, x, weight, bias, scales, lost=0.0):
    """Within what rounding allows of float64: sums in float32 in any order, then one rounding to the dtype of x.

    `in` products and the bias are summed: at most (in + 2) * 2**-24 of the sum of magnitudes, scale included. Many rows
    may go to torch with an int8 weight first rounded to the dtype of x, which moves each product by eps / 2. `lost` is
    what may be missing of each x, relative to the largest of its row.
    """
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], weight.shape[0])
    X, weights = (tensor.double().numpy() for tensor in (x, weight))
    if scales is not None:
        weights = weights * scales.double().numpy()[:, None]
    wanted, magnitude = X @ weights.T, np.abs(X) @ np.abs(weights).T
    if bias is not None:
        wanted, magnitude = wanted + bias.double().numpy(), magnitude + np.abs(bias.double().numpy())
    half = torch.finfo(x.dtype).eps / 2
    bound = (x.shape[-1] + 2) * 2.0**-24 * magnitude + half * np.abs(wanted) * (1 + half)
    if scales is not None and x.shape[:-1].numel() > 16:
        bound += half * magnitude
    if x.dtype == torch.float16:
        bound += 2.0**-25  # half a step of its subnormals
    bound += lost * np.abs(X).max(axis=-1, keepdims=True, initial=0) * np.abs(weights).sum(axis=1)
    difference = np.abs(got.double().numpy() - wanted)
    assert (difference <= bound).all(), (difference - bound).max()


@st.composite
def layers(draw):
    return layer(
        draw(st.integers(1, 20) | st.sampled_from([32, 33, 70])),
        draw(st.sampled_from([1, 8, 15, 16, 17, 32, 64]) | st.integers(1, 300)),
        draw(st.sampled_from([1, 3, 4, 5, 8]) | st.integers(1, 70)),
        dtype=draw(st.sampled_from(FLOATS)),
        quantised=draw(st.booleans()),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@given(layers())
@settings(max_examples=200)
def test_equals_numpy_in_float64(call):
    assert_right(skinny_linear(**call), **call)
    assert_right(reference.skinny_linear(*call.values()), **call)
    for isa in ISAS:
        assert_right(cpu.skinny_linear(*call.values(), isa=isa), **call)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_layer_of_many_tasks_is_whole(dtype, quantised, threads):
    """More than 128 KiB of weight, so several tasks on several threads; the number of threads changes no bit."""
    call = layer(3, 1031, 517, dtype=dtype, quantised=quantised)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(skinny_linear(**call))
    assert_right(results[0], **call)
    assert torch.equal(*results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(isa, dtype, quantised):
    call = layer(16, 133, 42, dtype=dtype, quantised=quantised)
    together = cpu.skinny_linear(*call.values(), isa=isa)
    for M in range(1, 16):
        for first in (0, 16 - M):
            some = {**call, "x": call["x"][first : first + M]}
            assert torch.equal(cpu.skinny_linear(*some.values(), isa=isa), together[first : first + M])


@pytest.mark.skipif("amx" not in ISAS, reason="only tiles take more than 16 rows before torch does")
@pytest.mark.parametrize("quantised", [False, True])
def test_with_tiles_this_holds_for_many_rows(quantised):
    """17, 33 and 65 rows are the first ones with a second, a third and a fifth tile of x."""
    call = layer(83, 133, 500, dtype=torch.bfloat16, quantised=quantised)
    together = cpu.skinny_linear(*call.values(), isa="amx")
    for M in (1, 4, 5, 16, 17, 32, 33, 64, 65, 82):
        some = {**call, "x": call["x"][:M]}
        assert torch.equal(cpu.skinny_linear(*some.values(), isa="amx"), together[:M])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_numbers_beside_large_ones_count_with_an_int8_weight(isa, dtype):
    """Tiles see numbers to 2^-30 of the largest in their row, whatever that is; here it meets a weight of 0."""
    call = layer(12, 200, 40, dtype=dtype, quantised=True, bias=False)
    call["x"] *= 2.0**-12
    call["x"][:, 7], call["weight"][:, 7] = 2.0 ** torch.arange(4, 16).to(dtype), 0
    call["x"] *= 2.0 ** torch.arange(-60, 60, 10)[:, None] if dtype == torch.bfloat16 else 1
    call["x"][3] = 0
    assert_right(cpu.skinny_linear(*call.values(), isa=isa), **call, lost=2.0**-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [2**17 - 1, 2**17])
def test_sums_of_the_largest_bytes_do_not_overflow(isa, width):
    """1 + 2^-6 as digits holds a -128, and -128 is the int8 of largest magnitude: 2^14 times fewer than 2^17."""
    x = torch.full((1, width), 1 + 2.0**-6, dtype=torch.bfloat16)
    weight, scales = torch.full((2, width), -128, dtype=torch.int8), torch.full((2,), 2.0**-24)
    out = cpu.skinny_linear(x, weight, None, scales, isa=isa)
    assert out.tolist() == [[torch.tensor(-(1 + 2.0**-6) * width * 2.0**-17).bfloat16().item()] * 2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matrices_stored_as_one_give_the_bits_of_each(isa, dtype):
    """q, k and v in one call; out rows are cut between blocks of four."""
    call = layer(2, 96, 31, dtype=dtype)
    whole = cpu.skinny_linear(*call.values(), isa=isa)
    for rows in (slice(0, 13), slice(13, 18), slice(18, 31)):
        part = {**call, "weight": call["weight"][rows], "bias": call["bias"][rows]}
        assert torch.equal(cpu.skinny_linear(*part.values(), isa=isa), whole[:, rows])


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (5, 4, 1, 40), (2, 0, 40), (0, 40)], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_any_number_of_leading_dimensions(shape, quantised):
    call = layer(20, 40, 9, quantised=quantised)
    call["x"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_right(skinny_linear(**call), **call)


@pytest.mark.parametrize("M", [1, 16, 17])
def test_no_outputs_and_no_inputs(M):
    none = layer(M, 8, 0)
    assert skinny_linear(**none).shape == (M, 0)
    call = layer(M, 0, 5)
    assert torch.equal(skinny_linear(**call), call["bias"].expand(M, 5))  # an empty sum


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_tensors_give_the_same_bits(dtype, quantised):
    call = layer(6, 50, 20, dtype=dtype, quantised=quantised)
    wanted = skinny_linear(**call)

    def gaps(x):  # every second element of a wider tensor
        return torch.stack([x, x + 1], -1)[..., 0]

    x, weight = call["x"], call["weight"]
    hidden = torch.cat([x, x + 1, x], 1)
    assert torch.equal(skinny_linear(**{**call, "x": hidden[:, :50]}), wanted)  # a slice of a wider activation
    assert torch.equal(skinny_linear(**{**call, "x": x.T.contiguous().T}), wanted)
    assert torch.equal(
        skinny_linear(**{**call, "x": x.view(2, 3, 50).transpose(0, 1)}).transpose(0, 1).flatten(0, 1), wanted
    )
    assert torch.equal(skinny_linear(**{**call, "x": x[:1].expand(6, 50)}), wanted[:1].expand(6, 20))
    assert torch.equal(skinny_linear(**{**call, "weight": torch.cat([weight, weight], 1)[:, :50]}), wanted)
    assert torch.equal(skinny_linear(**{**call, "weight": weight.T.contiguous().T}), wanted)
    vectors = {name: None if call[name] is None else gaps(call[name]) for name in ("bias", "scales")}
    assert torch.equal(skinny_linear(**{**call, **vectors}), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_lies_beside_the_weight_is_not_read(isa, dtype):
    """Rows of 37 elements end between vectors; their neighbours in memory are NaN."""
    call = layer(5, 37, 7, dtype=dtype)
    wanted = cpu.skinny_linear(*call.values(), isa=isa)
    for name in ("x", "weight"):
        rows = torch.full((call[name].shape[0], 80), torch.nan, dtype=dtype)
        rows[:, 3:40] = call[name]
        call[name] = rows[:, 3:40]
    assert torch.equal(cpu.skinny_linear(*call.values(), isa=isa), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_no_number_shows_in_its_row_and_in_no_other(isa, bad, dtype):
    call = layer(6, 37, 9, dtype=dtype)
    call["x"][4, 36] = bad
    out = cpu.skinny_linear(*call.values(), isa=isa)
    assert not out[4].isfinite().any()
    assert torch.equal(out[4].isnan(), torch.full((9,), bad != bad))
    assert out[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_an_int8_weight_too(isa, bad, dtype):
    """As tiles see x, infinity is no number: its row may be NaN instead."""
    call = layer(6, 37, 9, dtype=dtype, quantised=True)
    wanted = cpu.skinny_linear(*call.values(), isa=isa)
    call["x"][4, 20] = bad
    out = cpu.skinny_linear(*call.values(), isa=isa)
    assert not out[4].isfinite().any()
    others = [0, 1, 2, 3, 5]
    assert torch.equal(out[others], wanted[others])


@pytest.mark.parametrize("isa", ISAS)
def test_results_too_large_for_float16_are_infinite(isa):
    call = layer(1, 4, 2, dtype=torch.float16, bias=False)
    call["x"][:], call["weight"][0], call["weight"][1] = 200, 100, -100
    assert cpu.skinny_linear(*call.values(), isa=isa).tolist() == [[torch.inf, -torch.inf]]


@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("quantised", [False, True])
def test_inputs_are_left_as_they_are(M, quantised):
    call = layer(M, 33, 6, quantised=quantised)
    before = {name: None if x is None else x.clone() for name, x in call.items()}
    skinny_linear(**call)
    for name, x in call.items():
        assert x is before[name] is None or torch.equal(x, before[name])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(quantised, bias):
    call = layer(3, 17, 6, dtype=torch.bfloat16, quantised=quantised, bias=bias)
    torch.library.opcheck(torch.ops.anabranch.skinny_linear.default, tuple(call.values()))
    call["x"] = call["x"].view(1, 3, 17).transpose(0, 1)
    torch.library.opcheck(torch.ops.anabranch.skinny_linear.default, tuple(call.values()))


@pytest.mark.parametrize("M", [2, 20])
@pytest.mark.parametrize("quantised", [False, True])
def test_compiles_whole(M, quantised):
    call = layer(M, 17, 6, quantised=quantised)
    compiled = torch.compile(lambda **call: skinny_linear(**call).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**call), skinny_linear(**call).relu())


def test_devices_without_a_kernel_get_the_reference():
    op = "anabranch::skinny_linear"
    for key in ("CompositeExplicitAutograd", "CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    for key in ("MPS", "XPU", "PrivateUse1"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": lambda x: x[0, 0]}, r"x must be \[..., in\] and weight \[out, in\], got \[\] and \[6, 8\]"),
        ({"x": lambda x: x[:, :7]}, r"got \[3, 7\] and \[6, 8\]"),
        ({"weight": lambda w: w[0]}, r"got \[3, 8\] and \[8\]"),
        ({"weight": lambda w: w[None]}, r"got \[3, 8\] and \[1, 6, 8\]"),
        (
            {"x": lambda x: x.double()},
            "x must be float32, float16 or bfloat16 and weight the same or int8, got .*float64",
        ),
        ({"x": lambda x: x.int()}, "x must be float32, float16 or bfloat16 .* got torch.int32 and torch.float32"),
        ({"weight": lambda w: w.bfloat16()}, "weight the same or int8, got torch.float32 and torch.bfloat16"),
        ({"weight": lambda w: w.to(torch.uint8)}, "weight the same or int8, got torch.float32 and torch.uint8"),
        ({"weight": lambda w: w.to(torch.int8)}, "scales goes with an int8 weight and only with it, got .*int8"),
        ({"scales": lambda _: torch.ones(6)}, "scales goes with an int8 weight and only with it, got .*float32"),
        ({"bias": lambda b: b[:5]}, r"bias must be \[6\] torch.float32, got \[5\] torch.float32"),
        ({"bias": lambda b: b[None]}, r"bias must be \[6\] torch.float32, got \[1, 6\]"),
        ({"bias": lambda b: b.half()}, r"bias must be \[6\] torch.float32, got \[6\] torch.float16"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x[:40],
)
def test_bad_input_is_named(changes, words):
    call = layer(3, 8, 6)
    with pytest.raises(ValueError, match=words):
        skinny_linear(**{name: changes[name](x) if name in changes else x for name, x in call.items()})


@pytest.mark.parametrize("scales", [torch.ones(5), torch.ones(6).double(), torch.ones(6, 1)], ids=str)
def test_scales_must_fit_their_weight(scales):
    with pytest.raises(ValueError, match=r"scales must be \[6\] torch.float32, got"):
        skinny_linear(**{**layer(3, 8, 6, quantised=True), "scales": scales})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "scales"])
def test_tensors_on_two_devices_are_refused(name):
    call = layer(3, 8, 6, quantised=True)
    with pytest.raises(ValueError, match="device"):
        skinny_linear(**{**call, name: call[name].to("meta")})


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        cpu.skinny_linear(*layer(1, 8, 6).values(), isa="sse9")
