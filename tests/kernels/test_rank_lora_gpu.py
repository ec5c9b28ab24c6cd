"""The Triton kernels of rank_lora against the reference; interpreted on a CPU where there is no GPU.

Tiles are of 16 to 64 tokens and 64 or 128 columns; sizes cross their borders with as few tiles as possible.
"""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from anabranch_kernels.rank_lora import reference
from anabranch_kernels.rank_lora.op import GATES, Adapter, rank_lora, table_of

pytest.importorskip("triton")
from anabranch_kernels.rank_lora import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of D or of at most 24 products of numbers around one, in float32, and results rounded to the dtype; for many
# tokens also the factors of ranks are.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
RAGGED = (
    Adapter(first_rank=5, ranks=8, first_row=2, rows=8, chosen=3, gate="sigmoid_renorm", scale=4.0),
    Adapter(first_rank=0, ranks=5, scale=0.5),
    Adapter(first_rank=13, ranks=6, first_row=10, rows=3, chosen=1, gate="softmax_topk", scale=2.0),
    Adapter(first_rank=19, ranks=0),
    Adapter(first_rank=19, ranks=20, first_row=13, rows=5, chosen=4, gate="sigmoid_renorm_unbiased"),
)
R, G = 40, 19  # one rank and one row that belong to nobody


def problem(T, adapters=RAGGED, *, dtype=torch.float32, D=157, O=147, sizes=(R, G), seed=0):
    """x, a, b, router, bias, places, scales, adapter_of and the sizes of the table; some tokens have no adapter."""
    random = torch.Generator().manual_seed(seed)
    x, a, router = (torch.randn(n, D, generator=random) for n in (T, *sizes))
    b = torch.randn(sizes[0], O, generator=random)
    bias = 0.1 * torch.randn(sizes[1], generator=random)
    adapter_of = torch.randint(-1, len(adapters), (T,), generator=random).int()
    adapter_of[T // 4 : -T // 4] = 0  # more than a tile of one adapter where there are 40 tokens
    table = table_of(adapters)
    x, a, b, router = (t.to(dtype) for t in (x, a * D**-0.5, b, router * D**-0.5))
    return [x, a, b, router, bias, table.places, table.scales, adapter_of, *table[2:]]


def on_device(arguments):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in arguments]


def agrees(arguments):
    """Forward, in place, and backward are those of the reference."""
    x, _, b = arguments[:3]
    tolerance = TOLERANCE[x.dtype]
    close = partial(assert_close, rtol=tolerance, atol=tolerance)
    device = on_device(arguments)
    got = [t.cpu() for t in gpu.rank_lora_forward(*device)]
    wanted = reference.rank_lora_forward(*arguments)
    y, counts, picked, gates, h = got
    assert torch.equal(counts, wanted[1])
    assert torch.equal(picked, wanted[2])
    close(y, wanted[0])
    close(gates, wanted[3])
    close(h, wanted[4])
    assert not y[arguments[7] < 0].any()
    base = torch.randn(len(x), b.shape[1] + 3, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    sums = base.to(DEVICE, copy=True)
    gpu.add_rank_lora(sums[:, 1:-2], *device)
    close(sums.cpu()[:, 1:-2].float(), base[:, 1:-2].float() + wanted[0].float())
    untouched = torch.ones_like(base, dtype=torch.bool)
    untouched[arguments[7] >= 0, 1:-2] = False
    assert torch.equal(sums.cpu()[untouched], base[untouched])
    grad = base[:, :-3].contiguous()
    saved = picked, gates, h, *arguments[10:]
    mine = gpu.rank_lora_backward(*on_device([grad, *arguments[:8], *saved]))
    theirs = reference.rank_lora_backward(grad, *arguments[:8], *saved)
    for one, other in zip(mine, theirs, strict=True):
        scale = float(other.abs().max()) if other.numel() else 1.0
        assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=["few", "many", "wide"])
def path(request, monkeypatch):
    """Which kernels take the tokens, whatever their number."""
    if request.param != "few":
        monkeypatch.setattr(gpu, "FEW", 0)
    if request.param == "wide":
        monkeypatch.setattr(gpu, "FUSED", 0)


@pytest.mark.parametrize("T", [1, 40])
def test_ragged_adapters_mixed_equal_the_reference(T, path):
    agrees(problem(T))


def test_more_tokens_than_the_kernel_for_few_takes(monkeypatch):
    monkeypatch.setattr(gpu, "FEW", 16)
    agrees(problem(70))


@pytest.mark.parametrize("path", ["few", "many"], indirect=True)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("gate", GATES[1:])
def test_every_gate_and_block(gate, block, path):
    adapter = Adapter(first_rank=0, ranks=12 * block, rows=12, chosen=5, gate=gate, scale=0.5)
    agrees(problem(18, (adapter,), D=40, O=40, sizes=(12 * block, 12)))


def test_short_dtypes(path):
    """float16; the interpreter multiplies no matrices of bfloat16, which has tests on the GPU."""
    agrees(problem(18, dtype=torch.float16))


def test_ties_go_to_the_lowest_index(path):
    arguments = problem(3, (Adapter(first_rank=0, ranks=6, rows=6, chosen=2, gate="softmax_topk"),), sizes=(6, 6))
    arguments[3], arguments[4], arguments[7] = arguments[3] * 0, arguments[4] * 0, arguments[7] * 0
    assert gpu.rank_lora_forward(*on_device(arguments))[2].tolist() == [[0, 1]] * 3


def test_rows_may_lie_apart_and_ranks_be_shared(path):
    """Two adapters with the same ranks: their gradients add up."""
    both = RAGGED[0], Adapter(first_rank=3, ranks=20, scale=2.0)
    arguments = problem(18, both)
    arguments[:4] = (torch.stack([t, t + 1], 1)[:, 0] for t in arguments[:4])
    agrees(arguments)
    arguments[1:3] = (torch.stack([t, t + 1], 2)[:, :, 0] for t in arguments[1:3])
    agrees(arguments)


def test_a_token_of_no_adapter_that_exists_has_none(path):
    arguments = problem(4)
    arguments[7][:] = torch.tensor([-7, 5, 100, -1])
    y, counts, picked, _, _ = gpu.rank_lora_forward(*on_device(arguments))
    assert not y.any()
    assert not counts.any()
    assert (picked == -1).all()


@pytest.mark.parametrize(("T", "adapters"), [(0, RAGGED), (3, ()), (3, RAGGED[3:4])])
def test_nothing_to_do_is_done(T, adapters):
    agrees(problem(T, adapters))


def test_float64_goes_to_the_reference():
    arguments = problem(4, dtype=torch.float64)
    got, wanted = gpu.rank_lora_forward(*on_device(arguments)), reference.rank_lora_forward(*arguments)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine.cpu(), theirs)
    mine = gpu.rank_lora_backward(*on_device([wanted[0], *arguments[:8], *wanted[2:], *arguments[10:]]))
    theirs = reference.rank_lora_backward(wanted[0], *arguments[:8], *wanted[2:], *arguments[10:])
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one.cpu(), other)


SMORA = Adapter(first_rank=0, ranks=64, rows=64, chosen=8, gate="sigmoid_renorm_unbiased")
MANY = tuple(
    Adapter(first_rank=64 * n, ranks=64, first_row=64 * n, rows=64, chosen=8, gate="sigmoid_renorm") for n in range(16)
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("T", "adapters", "sizes"),
    [(1, (SMORA,), (64, 64)), (64, MANY, (1024, 1024)), (1000, (SMORA,), (64, 64)), (5000, MANY, (1024, 1024))],
)
def test_on_the_gpu_real_shapes(T, adapters, sizes, dtype):
    """Whole numbers, whose scores are exact in float32, so that rounding breaks no tie."""
    arguments = problem(T, adapters, dtype=dtype, D=4096, O=2048, sizes=sizes)
    arguments[0] = (2 * arguments[0]).round()
    arguments[3] = (2 * 64 * arguments[3].float()).round().to(dtype) / 256
    arguments[4] = torch.zeros_like(arguments[4])
    agrees(arguments)


@pytest.mark.gpu
def test_on_the_gpu_two_runs_agree_bit_for_bit():
    x, a, b, router, bias, *_, adapter_of, _, _, _, _ = on_device(
        problem(5000, MANY, dtype=torch.bfloat16, D=1024, O=1024, sizes=(1024, 1024))
    )
    leaves = [t.requires_grad_() for t in (x, a, b, router)]

    def run():
        routed = rank_lora(*leaves, bias, table_of(MANY, DEVICE), adapter_of)
        return *routed, *torch.autograd.grad(routed.y.float().square().sum(), leaves)

    first = run()
    for _ in range(5):
        for mine, theirs in zip(run(), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_on_the_gpu_opcheck_and_compile():
    x, a, b, router, bias, *places, adapter_of, chosen, active, rows, ranks = on_device(problem(20))
    arguments = x, a, b, router, bias, *places, adapter_of, chosen, active, rows, ranks
    torch.library.opcheck(torch.ops.anabranch.rank_lora_forward.default, arguments)
    y = torch.zeros(20, b.shape[1], device=DEVICE)
    torch.library.opcheck(torch.ops.anabranch.rank_lora_add.default, (y, *arguments))
    table = table_of(RAGGED, DEVICE)
    compiled = torch.compile(lambda *t: rank_lora(*t, bias, table, adapter_of).y, fullgraph=True)
    assert_close(compiled(x, a, b, router), rank_lora(x, a, b, router, bias, table, adapter_of).y)
