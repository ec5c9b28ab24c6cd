"""Cases of skinny_linear: a weight matrix times M rows, beside torch's linear, over M and the shapes of real layers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from anabranch.bench.timing import Case, Contender
from anabranch_kernels.skinny_linear.op import skinny_linear

ROWS = (1, 2, 4, 8, 16, 32)
# (out, in): q|k|v, gate|up, down of a 315M-parameter Llama; o of an 8B one; a vocabulary of 32k.
SHAPES = ((2560, 1536), (8192, 1536), (1536, 4096), (4096, 4096), (32000, 2048))
QUICK_SHAPES = ((96, 64), (33, 130))


def skinny(size: tuple[int, int], rows: Sequence[int], *, dtype: torch.dtype, working_set: int) -> list[Case]:
    """M x [out, in] for every M in `rows`; a step goes through copies of the matrix of `working_set` bytes in all.

    For torch.int8 the activations are bfloat16 and torch's contender has the same weights as bfloat16: what one would
    use without the op.
    """
    out, width = size
    values = torch.bfloat16 if dtype == torch.int8 else dtype
    count = -(-working_set // (out * width * dtype.itemsize))
    random = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, width, generator=random) * width**-0.5).to(values)
    quantised, scales = quantise(weight) if dtype == torch.int8 else (weight, None)
    weight = weight if scales is None else (quantised * scales[:, None]).to(values)
    ours, torchs = ([matrix.clone() for _ in range(count)] for matrix in (quantised, weight))

    def case(M: int) -> Case:
        x = torch.randn(M, width, generator=random).to(values)

        def contender(name: str, step: Callable[[], Tensor], stored: torch.dtype) -> Contender:
            read_bytes = count * out * width * stored.itemsize
            return Contender(name=name, step=step, read_bytes=read_bytes, flops=2 * M * out * width * count)

        return Case(
            name=f"M={M} [{out}, {width}] {name_of(dtype)}",
            calls=count,
            contenders=(
                contender("anabranch", lambda: [skinny_linear(x, w, scales=scales) for w in ours][-1], dtype),
                contender(f"torch {name_of(values)}", lambda: [linear(x, w) for w in torchs][-1], values),
            ),
        )

    return [case(M) for M in rows]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales [out]: largest magnitude / 127."""
    scales = weight.abs().amax(dim=1).float() / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
