"""Cases of rank_lora: one SMoRA adapter, and a batch in which every token may have another adapter, beside torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.rank_lora.op import Adapter, add_rank_lora, table_of

ROWS = (1, 4, 8, 16, 32, 64)


def one_adapter(T: int, *, width: int, ranks: int, chosen: int, dtype: torch.dtype, copies: int) -> Case:
    """T tokens through SMoRA's branch of a layer [width, width]; a step goes through `copies` layers.

    Beside it torch computes all ranks and multiplies those not picked by zero, which needs no gathering.
    """
    random = torch.Generator().manual_seed(T)
    layers = [_weights(width, ranks, ranks, dtype, random) for _ in range(copies)]
    stored = [b.T.contiguous() for _, b, _, _ in layers]
    x = torch.randn(T, width, generator=random).to(dtype)
    table = table_of([Adapter(first_rank=0, ranks=ranks, rows=ranks, chosen=chosen, gate="sigmoid_renorm")])
    of = torch.zeros(T, dtype=torch.int32)

    def ours() -> Tensor:
        for a, b, router, bias in layers:
            y = x.new_zeros(T, width)
            add_rank_lora(y, x, a, b, router, bias, table, of)
        return y

    def dense() -> Tensor:
        for (a, _, router, bias), b in zip(layers, stored, strict=True):
            scores = (x @ router.T).float().sigmoid() + bias
            best, index = scores.topk(chosen, 1)
            gates = torch.zeros_like(scores).scatter_(1, index, best / best.sum(1, keepdim=True))
            y = ((x @ a.T) * gates.to(dtype)) @ b.T
        return y

    touched = ranks * (1 - (1 - chosen / ranks) ** T)  # ranks that somebody picked, where all are picked alike
    read_bytes = int((ranks + 2 * touched) * width * dtype.itemsize) * copies
    flops = 2 * T * width * (ranks + 2 * chosen) * copies
    return Case(
        name=f"SMoRA n={T} d={width} r={ranks} k={chosen} {str(dtype).removeprefix('torch.')}",
        calls=copies,
        contenders=_contenders(("anabranch", ours), ("torch dense and mask", dense), read_bytes, flops),
    )


def many_adapters(T: int, *, width: int, ranks: int, adapters: int, dtype: torch.dtype, copies: int) -> Case:
    """T tokens of `adapters` LoRAs mixed; beside it a gather of each token's weights, and a loop over adapters."""
    random = torch.Generator().manual_seed(T)
    layers = [_weights(width, adapters * ranks, 0, dtype, random) for _ in range(copies)]
    x = torch.randn(T, width, generator=random).to(dtype)
    table = table_of([Adapter(first_rank=n * ranks, ranks=ranks) for n in range(adapters)])
    of = torch.randint(adapters, (T,), generator=random, dtype=torch.int32)

    def ours() -> Tensor:
        for a, b, router, bias in layers:
            y = x.new_zeros(T, width)
            add_rank_lora(y, x, a, b, router, bias, table, of)
        return y

    def gathered() -> Tensor:
        for a, b, _, _ in layers:
            A, B = a.view(adapters, ranks, width)[of], b.view(adapters, ranks, width)[of]
            y = torch.bmm(torch.bmm(x[:, None], A.mT), B)[:, 0]
        return y

    def loop() -> Tensor:
        for a, b, _, _ in layers:
            y = torch.zeros_like(x)
            for n in of.unique().tolist():
                rows = (of == n).nonzero()[:, 0]
                part = slice(n * ranks, (n + 1) * ranks)
                y.index_add_(0, rows, (x[rows] @ a[part].T) @ b[part])
        return y

    used = len(of.unique())
    read_bytes, flops = 2 * used * ranks * width * dtype.itemsize * copies, 4 * T * ranks * width * copies
    return Case(
        name=f"LoRA n={T} of {adapters} d={width} r={ranks} {str(dtype).removeprefix('torch.')}",
        calls=copies,
        contenders=_contenders(
            ("anabranch", ours), ("gathered weights", gathered), read_bytes, flops, ("loop over adapters", loop)
        ),
    )


def _weights(width: int, ranks: int, rows: int, dtype: torch.dtype, random: torch.Generator) -> tuple[Tensor, ...]:
    a, router = (torch.randn(n, width, generator=random) * width**-0.5 for n in (ranks, rows))
    b = torch.randn(ranks, width, generator=random)
    return a.to(dtype), b.to(dtype), router.to(dtype), torch.zeros(rows)


def _contenders(
    ours: tuple[str, Callable[[], Tensor]], theirs: tuple[str, Callable[[], Tensor]], read_bytes: int, flops: int,
    *others: tuple[str, Callable[[], Tensor]],
) -> tuple[Contender, ...]:  # fmt: skip
    return tuple(
        Contender(name=name, step=step, read_bytes=read_bytes, flops=flops) for name, step in (ours, theirs, *others)
    )
