"""Local SGD of many perceptrons beside torch's batched products and a plain loop of torch's own modules."""

from itertools import pairwise

import torch
from torch import Tensor

from anabranch.bench.federated_loop import Loop, Work
from anabranch.bench.timing import Case, Contender
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.schedule import Schedule
from anabranch_kernels.perceptron_sgd import gpu
from anabranch_kernels.perceptron_sgd.op import perceptron_sgd

NEAR = 1e-4  # float32 after some steps


def local_epoch(widths: tuple[int, ...], *, N: int, n: int, batch: int) -> Case:
    """N perceptrons, each of which goes once through n samples of its own; results are the means of their rows."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(N * n, widths[0], generator=generator), torch.randint(widths[-1], (N * n,), generator=generator)
    index, start = torch.arange(N * n).view(N, n), MLP(widths).first(generator)
    schedule = Schedule(epochs=1, batch=batch)
    sgd = {"lr": schedule.lr, "momentum": schedule.momentum, "weight_decay": schedule.weight_decay}
    counts, told = torch.full((N,), n), y[index]

    def fresh() -> tuple[Tensor, Tensor]:
        rows = start.repeat(N, 1)
        return rows, torch.zeros_like(rows)

    def ours() -> Tensor:
        rows, velocity = fresh()
        perceptron_sgd(rows, velocity, x, index, told, counts, widths=widths, batch=batch, **sgd)
        return rows.mean(0)

    def batched() -> Tensor:
        rows, velocity = fresh()
        gpu.perceptron_sgd(rows, velocity, x, index, told, counts, widths, batch, *sgd.values())
        return rows.mean(0)

    loop = Loop(Work(widths=widths, x=x, y=y, index=index, start=start, schedule=schedule))
    products = sum(a * b for a, b in pairwise(widths))
    work = {"flops": 2 * N * n * (3 * products - widths[0] * widths[1]), "read_bytes": x.nbytes}
    contenders = {"anabranch": ours, "torch bmm": batched, "torch loop": loop.round}
    return Case(
        name=f"{'-'.join(map(str, widths))} N={N} n={n} B={batch}",
        contenders=tuple(Contender(name=k, step=step, tolerance=NEAR, **work) for k, step in contenders.items()),
    )
