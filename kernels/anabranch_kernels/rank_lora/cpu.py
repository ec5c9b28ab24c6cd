"""Adapters with routed ranks on the CPU: C++ (csrc/rank_lora.cpp).

Layout   B is stored by rank, so the rows of A and of B that a token picked are read where they lie. Tasks are up to
         eight tokens of one adapter; what tokens share, routers and plain LoRA, meets them in registers.
Bound    the router: r of the r + 2k rows that a token reads. Then the second cache.
Numerics float32 scores and sums, whatever the dtype; a token's result does not depend on the others in the batch.
         Backward sums over tokens in rising order.
Not here float64: it goes to the reference. Backward of plain LoRA is six products of matrices: torch's.
"""

import torch
from torch import Tensor

from ..native import ISA, TYPES, extension
from ..tensors import dense_rows
from . import reference

ALONE = 500_000  # products of a part that one thread has done before others have woken up


def rank_lora_forward(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor,
    chosen: int, active: int, rows: int, ranks: int, isa: str = ISA,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return reference.rank_lora_forward(
            x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks
        )
    T, G = len(x), len(router)
    y, counts = x.new_empty(T, b.shape[1]), x.new_empty(G, dtype=torch.int64)
    picked = x.new_empty(T, chosen, dtype=torch.int32)
    gates, h = x.new_empty(T, chosen, dtype=torch.float32), x.new_empty(T, active, dtype=torch.float32)
    saved = (counts.data_ptr(), picked.data_ptr(), gates.data_ptr(), h.data_ptr())
    _call(y, saved, x, a, b, router, bias, places, scales, adapter_of, chosen, active, isa)
    return y, counts, picked, gates, h


def add_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, chosen: int, active: int, rows: int, ranks: int, isa: str = ISA,
) -> None:  # fmt: skip
    if x.dtype == torch.float64 or y.stride(1) != 1:
        reference.add_rank_lora(y, x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks)
    else:
        _call(y, None, x, a, b, router, bias, places, scales, adapter_of, chosen, active, isa)


def add_fused_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, parts: list[int], chosen: int, active: int, rows: int, ranks: int, isa: str = ISA,
) -> None:  # fmt: skip
    """One call of the extension for each part, all from pointers: a small model's step would else be mostly Python."""
    if x.dtype == torch.float64 or y.stride(1) != 1:
        reference.add_fused_rank_lora(
            y, x, a, b, router, bias, places, scales, adapter_of, parts, chosen, active, rows, ranks
        )
        return
    x, adapter_of = dense_rows(x), adapter_of.contiguous()
    (_, R, D), G, A, O = a.shape, bias.shape[1], scales.shape[1], b.shape[1]
    size, kind, y_row, tokens = a.itemsize, TYPES[a.dtype], y.stride(0), _rows(x)
    a_at, b_at, router_at, bias_at = a.data_ptr(), b.data_ptr(), router.data_ptr(), bias.data_ptr()
    places_at, scales_at, of_at, y_at = places.data_ptr(), scales.data_ptr(), adapter_of.data_ptr(), y.data_ptr()
    sizes, most_threads = (len(x), A, R, G, chosen, active), torch.get_num_threads()
    for at in range(0, len(parts), 3):
        p, begin, end = parts[at : at + 3]
        threads = most_threads if len(x) * (rows + active) * (D + end - begin) > ALONE else 1
        extension.rank_lora(
            tokens, (a_at + p * R * D * size, kind, D, D), (b_at + begin * size, kind, O, end - begin),
            (router_at + p * G * D * size, kind, D, D), bias_at + p * G * 4, places_at + p * A * 24,
            scales_at + p * A * 4, of_at, (y_at + begin * size, y_row, 0, 0, 0, 0), sizes, True, isa, threads,
        )  # fmt: skip


def _call(
    y: Tensor, saved: tuple[int, ...] | None, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor,
    places: Tensor, scales: Tensor, adapter_of: Tensor, chosen: int, active: int, isa: str,
) -> None:  # fmt: skip
    x, a, b, router = dense_rows(x), dense_rows(a), dense_rows(b), dense_rows(router)
    bias, adapter_of = bias.contiguous(), adapter_of.contiguous()
    extension.rank_lora(
        _rows(x), _rows(a), _rows(b), _rows(router), bias.data_ptr(), places.data_ptr(), scales.data_ptr(),
        adapter_of.data_ptr(), (y.data_ptr(), y.stride(0), *(saved or (0, 0, 0, 0))),
        (len(x), len(scales), len(a), len(router), chosen, active), saved is None, isa, torch.get_num_threads(),
    )  # fmt: skip


def rank_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, picked: Tensor, gates: Tensor, h: Tensor, rows: int, ranks: int,
    isa: str = ISA,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return reference.rank_lora_backward(
            grad, x, a, b, router, bias, places, scales, adapter_of, picked, gates, h, rows, ranks
        )
    found = [torch.zeros(t.shape) for t in (a, b, router)]
    whole: Tensor | None = None  # the gradient of x: of a single adapter as it comes, else gathered
    for index, ((first, ranks, row, rows, chosen, gate), scale) in enumerate(
        zip(places.tolist(), scales.tolist(), strict=True)
    ):
        tokens = (adapter_of == index).nonzero()[:, 0]
        if not len(tokens) or not ranks:
            continue
        mine = tokens if len(tokens) < len(x) else slice(None)
        dy, X, hidden = grad[mine], x[mine], h[mine]
        A, B, W = a[first : first + ranks], b[first : first + ranks], router[row : row + rows]
        if gate == reference.CONSTANT:
            dx, dA, dB = _plain(dy, X, A, B, hidden[:, :ranks], scale)
        else:
            dx, dA, dB, dW = _routed(
                dy, X, picked[mine, :chosen], gates[mine, :chosen], hidden, A, B, W, bias[row : row + rows], gate,
                scale, isa,
            )  # fmt: skip
            found[2][row : row + rows] += dW
        if len(tokens) == len(x):
            whole = dx
        else:
            whole = torch.zeros(x.shape) if whole is None else whole
            whole[tokens] = dx
        found[0][first : first + ranks] += dA
        found[1][first : first + ranks] += dB
    dx, da, db, drouter = (g.to(x.dtype) for g in (torch.zeros(x.shape) if whole is None else whole, *found))
    return dx, da, db, drouter


def _plain(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dh = (grad @ B.T).mul_(scale)
    return (dh @ A).float(), (dh.T @ x).float(), ((scale * h).to(grad.dtype).T @ grad).float()


def _routed(
    grad: Tensor, x: Tensor, picked: Tensor, gates: Tensor, h: Tensor, A: Tensor, B: Tensor, W: Tensor, bias: Tensor,
    gate: int, scale: float, isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of one adapter's tokens, by lists: rows that each token picked, tokens that picked each row."""
    block, chosen = len(A) // len(W), picked.shape[1]
    picked, h = picked.contiguous(), h[:, : chosen * block]
    ranks = (picked[:, :, None] * block + torch.arange(block, dtype=torch.int32)).flatten(1)
    each = gates.repeat_interleave(block, 1)
    dv = _dots(B, ranks, grad, isa).mul_(scale)
    dgates = (h * dv).unflatten(1, (chosen, block)).sum(2)
    dlogits = reference.gates_backward(dgates, gates, _dots(W, picked, x, isa), bias[picked.long()], gate)
    dh, v = each * dv, each * h * scale
    dx = _sums(A, ranks, dh, isa) + _sums(W, picked, dlogits, isa)
    by_rank, by_block = _Transposed(ranks, len(A)), _Transposed(picked, len(W))
    return dx, by_rank.sums(x, dh, isa), by_rank.sums(grad, v, isa), by_block.sums(x, dlogits, isa)


class _Transposed:
    """Lists of tokens that picked each row, from lists [T, n] of the rows that each token picked."""

    def __init__(self, index: Tensor, rows: int) -> None:
        flat = index.flatten()
        self._order = flat.argsort(stable=True)
        self._tokens = (self._order // index.shape[1]).int()
        self._offsets = torch.zeros(rows + 1, dtype=torch.int64)
        torch.cumsum(flat.bincount(minlength=rows), 0, out=self._offsets[1:])

    def sums(self, rows: Tensor, factors: Tensor, isa: str) -> Tensor:
        return _listed_sums(rows, self._offsets, self._tokens, factors.flatten()[self._order], isa)


def _offsets(index: Tensor) -> Tensor:
    return torch.arange(len(index) + 1) * index.shape[1]


def _dots(rows: Tensor, index: Tensor, x: Tensor, isa: str) -> Tensor:
    """[T, n] float32: of x's rows with the rows that index [T, n] names."""
    rows, x, out, offsets = dense_rows(rows), dense_rows(x), torch.empty(index.shape), _offsets(index)
    extension.listed_dots(
        _rows(rows), offsets.data_ptr(), index.data_ptr(), len(index), _rows(x), out.data_ptr(), isa,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _sums(rows: Tensor, index: Tensor, factors: Tensor, isa: str) -> Tensor:
    return _listed_sums(rows, _offsets(index), index, factors.contiguous(), isa)


def _listed_sums(rows: Tensor, offsets: Tensor, index: Tensor, factors: Tensor, isa: str) -> Tensor:
    rows, out = dense_rows(rows), torch.empty(len(offsets) - 1, rows.shape[1])
    extension.listed_sums(
        _rows(rows), offsets.data_ptr(), index.data_ptr(), len(out), factors.data_ptr(), out.data_ptr(), isa,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), TYPES[x.dtype], x.stride(0), x.shape[1])
