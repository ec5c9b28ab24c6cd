"""Cases of rank_lora: one SMoRA adapter, and a batch in which every token may have another adapter, beside torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.rank_lora.op import Adapter, add_rank_lora, table_of

ROWS = (1, 4, 8, 16, 32, 64)


def one_adapter(T: int, *, width: int, ranks: int, chosen: int, dtype: torch.dtype, copies: int) -> Case:
    """T tokens through SMoRA's branch of a layer [width, width], added to its output; a step goes through `copies`.

    Beside it torch computes all ranks and multiplies those not picked by zero, which needs no gathering.
    """
    random = torch.Generator().manual_seed(T)
    layers = [_weights(width, ranks, ranks, dtype, random) for _ in range(copies)]
    stored = [b.T.contiguous() for _, b, _, _ in layers]
    x = torch.randn(T, width, generator=random).sign().to(dtype)
    table = table_of([Adapter(first_rank=0, ranks=ranks, rows=ranks, chosen=chosen, gate="sigmoid_renorm")])
    of = torch.zeros(T, dtype=torch.int32)
    base = torch.randn(T, width, generator=random).to(dtype)
    y = torch.empty_like(base)

    def ours() -> Tensor:
        y.copy_(base)
        for a, b, router, bias in layers:
            add_rank_lora(y, x, a, b, router, bias, table, of)
        return y

    def dense() -> Tensor:
        y.copy_(base)
        for (a, _, router, bias), b in zip(layers, stored, strict=True):
            scores = (x @ router.T).float().sigmoid() + bias
            best, index = scores.topk(chosen, 1)
            gates = torch.zeros_like(scores).scatter_(1, index, best / best.sum(1, keepdim=True))
            y.addmm_((x @ a.T) * gates.to(dtype), b.T)
        return y

    touched = ranks * (1 - (1 - chosen / ranks) ** T)  # ranks that somebody picked, where all are picked alike
    read_bytes = int((ranks + 2 * touched) * width * dtype.itemsize) * copies
    flops = 2 * T * width * (ranks + 2 * chosen) * copies
    return Case(
        name=f"SMoRA n={T} d={width} r={ranks} k={chosen} {str(dtype).removeprefix('torch.')}",
        calls=copies,
        contenders=_contenders(("anabranch", ours), ("torch dense and mask", dense), read_bytes, flops),
    )


def many_adapters(
    T: int, *, width: int, ranks: int, adapters: int, dtype: torch.dtype, copies: int
) -> tuple[Case, list[str]]:
    """T tokens of `adapters` LoRAs mixed, added to the layer's output, and which peers are not there.

    Beside it a gather of each token's weights, a loop over adapters, and PEFT's mixed batch, whose product with the
    layer's own weight is left out.
    """
    random = torch.Generator().manual_seed(T)
    layers = [_weights(width, adapters * ranks, 0, dtype, random) for _ in range(copies)]
    x, base = (torch.randn(T, width, generator=random).to(dtype) for _ in range(2))
    table = table_of([Adapter(first_rank=n * ranks, ranks=ranks) for n in range(adapters)])
    of = torch.randint(adapters, (T,), generator=random, dtype=torch.int32)
    y = torch.empty_like(base)

    def ours() -> Tensor:
        y.copy_(base)
        for a, b, router, bias in layers:
            add_rank_lora(y, x, a, b, router, bias, table, of)
        return y

    def gathered() -> Tensor:
        y.copy_(base)
        for a, b, _, _ in layers:
            A, B = a.view(adapters, ranks, width)[of], b.view(adapters, ranks, width)[of]
            y[:, None].baddbmm_(torch.bmm(x[:, None], A.mT), B)
        return y

    def loop() -> Tensor:
        y.copy_(base)
        for a, b, _, _ in layers:
            for n in of.unique().tolist():
                rows = (of == n).nonzero()[:, 0]
                part = slice(n * ranks, (n + 1) * ranks)
                y.index_add_(0, rows, (x[rows] @ a[part].T) @ b[part])
        return y

    others = [("loop over adapters", loop)]
    absent = []
    try:
        others.append(("PEFT, mixed batch", _peft([(a, b) for a, b, _, _ in layers], x, y, base, ranks, of.tolist())))
    except ImportError:
        absent.append("PEFT: not installed")
    used = len(of.unique())
    read_bytes, flops = 2 * used * ranks * width * dtype.itemsize * copies, 4 * T * ranks * width * copies
    case = Case(
        name=f"LoRA n={T} of {adapters} d={width} r={ranks} {str(dtype).removeprefix('torch.')}",
        calls=copies,
        contenders=_contenders(("anabranch", ours), ("gathered weights", gathered), read_bytes, flops, *others),
    )
    return case, absent


def _peft(
    layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, base: Tensor, ranks: int, of: list[int]
) -> Callable[[], Tensor]:
    """PEFT's layers with these adapters, which add to y instead of the product with a weight of their own."""
    import peft

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return y

    width, built = x.shape[1], list[Any]()
    for a, b in layers:
        config = peft.LoraConfig(r=ranks, lora_alpha=ranks, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(width, width)), config, adapter_name="0")
        for n in range(1, len(a) // ranks):
            model.add_adapter(str(n), config)
        wrapped: Any = model.eval().to(x.dtype)
        layer = wrapped.base_model.model[0]
        for n in range(len(a) // ranks):
            part = slice(n * ranks, (n + 1) * ranks)
            layer.lora_A[str(n)].weight.data = a[part]
            layer.lora_B[str(n)].weight.data = b[part].T.contiguous()
        layer.base_layer = Given()
        built.append(layer)
    names = [str(n) for n in of]

    @torch.no_grad()
    def step() -> Tensor:
        y.copy_(base)
        for layer in built:
            out: Tensor = layer(x, adapter_names=names)
        return out

    return step


def _weights(width: int, ranks: int, rows: int, dtype: torch.dtype, random: torch.Generator) -> tuple[Tensor, ...]:
    a, b = (torch.randn(ranks, width, generator=random) for _ in range(2))
    return (a * width**-0.5).to(dtype), b.to(dtype), *exact_router(rows, width, dtype, random)


def exact_router(rows: int, width: int, dtype: torch.dtype, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Router and bias whose scores of tokens of ones and minus ones are exact in every dtype, and no two of them equal.

    Sums of bfloat16 products, rounded, would else pick other ranks than exact ones for one token in forty, and
    contenders could not be compared. Four in ten of the router's elements are 1 or -1, over 32.
    """
    signs = torch.randn(rows, width, generator=random).sign()
    kept = torch.rand(rows, width, generator=random) < min(1.0, 1600 / width)
    return (signs * kept / 32).to(dtype), torch.arange(rows) * 1e-5


def _contenders(
    ours: tuple[str, Callable[[], Tensor]], theirs: tuple[str, Callable[[], Tensor]], read_bytes: int, flops: int,
    *others: tuple[str, Callable[[], Tensor]],
) -> tuple[Contender, ...]:  # fmt: skip
    return tuple(
        Contender(name=name, step=step, read_bytes=read_bytes, flops=flops) for name, step in (ours, theirs, *others)
    )
