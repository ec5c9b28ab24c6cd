"""Adapters on a GPU: SMoRA in decode and training, plain LoRAs of many ranks in one batch, beside torch.

Peers: torch op by op and compiled, in the formulation that multiplies all ranks by a mask; for training also the
released formulation, which gathers the picked rows of each token (its TVM kernels replaced by torch), and a plain LoRA
of the same rank, which does not route; for many adapters a gather of each token's weights and a loop over adapters.
"""

from collections.abc import Callable, Sequence

import torch
from cases import Bench, Step
from torch import Tensor

from anabranch.bench.rank_lora import exact_router
from anabranch.bench.timing import Case
from anabranch_kernels.rank_lora.op import Adapter, Table, add_rank_lora, rank_lora, table_of

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # a [R, D], b [R, O], router [G, D], bias [G]


def _weights(bench: Bench, width: int, ranks: int, rows: int) -> Weights:
    a, b = (torch.randn(ranks, width, device=bench.device) for _ in range(2))
    router, bias = exact_router(rows, width, bench.dtype, torch.Generator().manual_seed(rows))
    return (a * width**-0.5).to(bench.dtype), b.to(bench.dtype), router.to(bench.device), bias.to(bench.device)


def _signs(bench: Bench, T: int, width: int) -> Tensor:
    """Tokens whose scores are exact (anabranch.bench.rank_lora.exact_router)."""
    return torch.randn(T, width, device=bench.device).sign().to(bench.dtype)


def _dense(x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, chosen: int) -> Tensor:
    """All ranks, those not picked multiplied by zero."""
    p = (x @ router.T).float().sigmoid()
    index = (p + bias).topk(chosen, 1).indices
    kept = p.gather(1, index)
    gates = torch.zeros_like(p).scatter(1, index, kept / kept.sum(1, keepdim=True))
    return ((x @ a.T) * gates.to(x.dtype)) @ b


def _gathered(x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, chosen: int) -> Tensor:
    """The picked rows of each token, gathered."""
    p = (x @ router.T).float().sigmoid()
    index = (p + bias).topk(chosen, 1).indices
    kept = p.gather(1, index)
    h = torch.einsum("td,tkd->tk", x, a[index]) * (kept / kept.sum(1, keepdim=True)).to(x.dtype)
    return torch.einsum("tk,tko->to", h, b[index])


def _walk(bench: Bench, layers: Sequence[Weights], shape: tuple[int, int], one: Callable[[Weights], Tensor]) -> Step:
    def step() -> Tensor:
        y = torch.zeros(shape, device=bench.device, dtype=bench.dtype)
        for layer in layers:
            y += one(layer)
        return y

    return step


def _ours(
    bench: Bench, layers: Sequence[Weights], x: Tensor, table: Table, adapter_of: Tensor, shape: tuple[int, int]
) -> Step:
    def step() -> Tensor:
        y = torch.zeros(shape, device=bench.device, dtype=bench.dtype)
        for layer in layers:
            add_rank_lora(y, x, *layer, table, adapter_of)
        return y

    return step


def decode(bench: Bench, T: int, adapters: int, *, width: int, ranks: int, chosen: int, copies: int) -> Case:
    """T tokens of `adapters` SMoRA adapters mixed, through `copies` layers."""
    name = f"SMoRA n={T} of {adapters} d={width} r={ranks} k={chosen}"
    layers = [_weights(bench, width, adapters * ranks, adapters * ranks) for _ in range(copies)]
    x = _signs(bench, T, width)
    places = [
        Adapter(
            first_rank=n * ranks, ranks=ranks, first_row=n * ranks, rows=ranks, chosen=chosen,
            gate="sigmoid_renorm_unbiased",
        )
        for n in range(adapters)
    ]  # fmt: skip
    adapter_of = torch.arange(T, dtype=torch.int32, device=bench.device) % adapters
    tokens = [torch.arange(n, T, adapters, device=bench.device) for n in range(adapters)]

    def torchs(function: Callable[..., Tensor]) -> Callable[[Weights], Tensor]:
        def one(layer: Weights) -> Tensor:
            if adapters == 1:
                return function(x, *layer, chosen)
            y = torch.empty_like(x)
            for n in range(adapters):
                mine = (tensor[n * ranks : (n + 1) * ranks] for tensor in layer)
                y[tokens[n]] = function(x[tokens[n]], *mine, chosen)
            return y

        return one

    touched = ranks * (1 - (1 - chosen / ranks) ** (T / adapters))  # ranks of an adapter that somebody picked
    read = int(adapters * (ranks + 2 * touched) * width * bench.dtype.itemsize) * copies
    flops = 2 * T * width * (ranks + 2 * chosen) * copies
    shape = T, width
    steps: dict[str, Step] = {
        "anabranch": _ours(bench, layers, x, table_of(places, bench.device), adapter_of, shape),
        "torch, dense and mask": _walk(bench, layers, shape, torchs(_dense)),
        "torch compiled, dense and mask": _walk(bench, layers, shape, torchs(bench.compile(_dense))),
        "torch, gathered": _walk(bench, layers, shape, torchs(_gathered)),
    }
    timed = {title: (step, read, flops, 0.05) for title, step in steps.items()}
    return Case(name=name, contenders=bench.contenders(name, timed), calls=copies)


def plain(bench: Bench, T: int, ranks: Sequence[int], *, width: int, copies: int) -> Case:
    """T tokens of plain LoRAs of these ranks mixed, through `copies` layers."""
    A = len(ranks)
    name = f"LoRA n={T} of {A}, ranks {min(ranks)} to {max(ranks)}, d={width}"
    layers = [_weights(bench, width, sum(ranks), 0) for _ in range(copies)]
    x = torch.randn(T, width, device=bench.device, dtype=bench.dtype)
    firsts = [sum(ranks[:n]) for n in range(A)]
    places = [Adapter(first_rank=first, ranks=r) for first, r in zip(firsts, ranks, strict=True)]
    owner = torch.arange(T) % A
    adapter_of = owner.int().to(bench.device)
    tokens = [(owner == n).nonzero()[:, 0].to(bench.device) for n in range(A)]

    def loop(layer: Weights) -> Tensor:
        y = torch.empty_like(x)
        for n, mine in enumerate(tokens):
            if len(mine):
                part = slice(firsts[n], firsts[n] + ranks[n])
                y[mine] = (x[mine] @ layer[0][part].T) @ layer[1][part]
        return y

    widest = torch.tensor(
        [[first + min(i, r - 1) for i in range(max(ranks))] for first, r in zip(firsts, ranks, strict=True)]
    )
    exists = torch.tensor([[float(i < r) for i in range(max(ranks))] for r in ranks])
    index, mask = widest[owner].to(bench.device), exists[owner].to(bench.device, bench.dtype)

    def gathered(layer: Weights) -> Tensor:
        h = torch.bmm(layer[0][index], x[:, :, None])[:, :, 0] * mask
        return torch.bmm(h[:, None], layer[1][index])[:, 0]

    used = sum(r for n, r in enumerate(ranks) if n < T)
    read, flops = 2 * used * width * bench.dtype.itemsize * copies, 4 * width * int(mask.sum()) * copies
    shape = T, width
    steps: dict[str, Step] = {
        "anabranch": _ours(bench, layers, x, table_of(places, bench.device), adapter_of, shape),
        "torch, loop over adapters": _walk(bench, layers, shape, loop),
    }
    if T * max(ranks) * width * bench.dtype.itemsize <= 4 << 30:
        steps["torch, gathered weights"] = _walk(bench, layers, shape, gathered)
    timed = {title: (step, read, flops, 0.05) for title, step in steps.items()}
    return Case(name=name, contenders=bench.contenders(name, timed), calls=copies)


def train(bench: Bench, T: int, *, width: int, ranks: int, chosen: int) -> Case:
    """Forward and backward of one SMoRA branch over T tokens; the result is the gradient of x.

    The LoRA of the same rank computes something else, so its result is not compared.
    """
    name = f"train SMoRA T={T} d={width} r={ranks} k={chosen}"
    a, b, router, bias = _weights(bench, width, ranks, ranks)
    x, grad = _signs(bench, T, width), torch.randn(T, width, device=bench.device, dtype=bench.dtype)
    leaves = [t.requires_grad_() for t in (x, a, b, router)]
    table = table_of(
        [Adapter(first_rank=0, ranks=ranks, rows=ranks, chosen=chosen, gate="sigmoid_renorm_unbiased")], bench.device
    )
    adapter_of = torch.zeros(T, dtype=torch.int32, device=bench.device)

    def backward(forward: Callable[..., Tensor], wanted: Sequence[Tensor]) -> Step:
        return lambda: torch.autograd.grad(forward(*leaves), wanted, grad)[0]

    compiled = bench.compile(_dense)
    read = 7 * x.nbytes + 6 * (a.nbytes + b.nbytes + router.nbytes)
    flops = 2 * T * width * ranks * 9  # three products forward, six backward
    steps: dict[str, tuple[Step, float]] = {
        "anabranch": (backward(lambda x, a, b, w: rank_lora(x, a, b, w, bias, table, adapter_of).y, leaves), 0.05),
        "torch, dense and mask": (backward(lambda x, a, b, w: _dense(x, a, b, w, bias, chosen), leaves), 0.05),
        "torch compiled, dense and mask": (
            backward(lambda x, a, b, w: compiled(x, a, b, w, bias, chosen), leaves), 0.05,
        ),
        "torch, gathered": (backward(lambda x, a, b, w: _gathered(x, a, b, w, bias, chosen), leaves), 0.05),
        "torch, LoRA of all ranks without routing": (
            backward(lambda x, a, b, w: (x @ a.T) @ b, leaves[:3]), float("inf"),
        ),
    }  # fmt: skip
    timed = {title: (step, read, flops, tolerance) for title, (step, tolerance) in steps.items()}
    return Case(name=name, contenders=bench.contenders(name, timed))
