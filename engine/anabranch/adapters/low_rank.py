"""What adapters that change their ranks have in common: a branch without a router, and the orthogonality penalty."""

from collections.abc import Iterable

import torch
from torch import Tensor

from anabranch_kernels.rank_lora.op import Table, rank_lora


def low_rank(x: Tensor, a: Tensor, b: Tensor, table: Table, adapter_of: Tensor | None) -> Tensor:
    """scale * x A^T B of every token: [..., inputs] -> [..., outputs].

    a           [r, inputs]  dtype of x
    b           [r, outputs]  dtype of x
    table       of one adapter without a router
    adapter_of  [tokens] int32: 0 for tokens that take part, -1 for padding; all do if None
    """
    rows = x.reshape(-1, x.shape[-1])
    if adapter_of is None:
        adapter_of = torch.zeros(len(rows), dtype=torch.int32, device=x.device)
    router, bias = x.new_empty(0, x.shape[-1]), torch.empty(0, device=x.device)
    return rank_lora(rows, a, b, router, bias, table, adapter_of).y.view(*x.shape[:-1], -1)


def orthogonality(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of ||A A^T - I||_F over all A [r, inputs] and B [r, outputs]: zero where their rows are orthonormal."""
    distances = [
        torch.linalg.matrix_norm(x @ x.T - torch.eye(len(x), dtype=x.dtype, device=x.device))
        for pair in pairs
        for x in pair
    ]
    return torch.stack(distances).mean()
