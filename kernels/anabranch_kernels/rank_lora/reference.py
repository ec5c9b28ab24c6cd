"""Adapters one after another, in float64, all ranks computed and those not picked multiplied by zero."""

from typing import Any

import torch
from torch import Tensor

from ..tensors import sum_dtype, wide

CONSTANT, SOFTMAX, SIGMOID, UNBIASED = range(4)  # op.GATES
SMALLEST = 2.0**-20  # of a biased score: gates are positive whatever the bias


def route(logits: Tensor, bias: Tensor, chosen: int, gate: int) -> tuple[Tensor, Tensor]:
    """Blocks picked by each token [T, chosen], rising, and their gates."""
    scores = logits if gate == SOFTMAX else logits.sigmoid()
    biased = scores + bias
    best = biased.detach().sort(dim=1, descending=True, stable=True).indices[:, :chosen].sort(dim=1).values
    if gate == SOFTMAX:
        return best, biased.gather(1, best).softmax(1)
    kept = (biased.clamp_min(SMALLEST) if gate == SIGMOID else scores).gather(1, best)
    return best, kept / kept.sum(1, keepdim=True)


def _branch(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, place: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One adapter: y, picked blocks, their gates, <A_i, x> of the ranks in them."""
    first, ranks, row, rows, chosen, gate = place
    h = x @ a[first : first + ranks].T
    if gate == CONSTANT:
        return scale * h @ b[first : first + ranks], h.new_empty(len(x), 0).long(), h.new_empty(len(x), 0), h
    picked, gates = route(x @ router[row : row + rows].T, bias[row : row + rows], chosen, gate)
    block = ranks // rows
    whole = torch.zeros_like(h[:, ::block]).scatter(1, picked, gates).repeat_interleave(block, 1)
    of_picked = (picked[:, :, None] * block + torch.arange(block, device=x.device)).flatten(1)
    return scale * (h * whole) @ b[first : first + ranks], picked, gates, h.gather(1, of_picked)


def rank_lora_forward(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor,
    chosen: int, active: int, rows: int, ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = sum_dtype(x)
    T = len(x)
    y, counts = x.new_zeros(T, b.shape[1]), x.new_zeros(len(router), dtype=torch.int64)
    picked = x.new_full((T, chosen), -1, dtype=torch.int32)
    gates, h = x.new_zeros(T, chosen, dtype=dtype), x.new_zeros(T, active, dtype=dtype)
    weights = (wide(a), wide(b), wide(router), wide(bias))
    for index, (place, scale) in enumerate(zip(places.tolist(), scales.tolist(), strict=True)):
        tokens = (adapter_of == index).nonzero()[:, 0]
        branch, blocks, gate, hidden = _branch(wide(x[tokens]), *weights, place, scale)
        y[tokens] = branch.to(y.dtype)
        picked[tokens, : blocks.shape[1]] = blocks.int()
        gates[tokens, : blocks.shape[1]] = gate.to(dtype)
        h[tokens, : hidden.shape[1]] = hidden.to(dtype)
        row, rows = place[2:4]
        counts[row : row + rows] += blocks.flatten().bincount(minlength=rows) if rows else 0
    return y, counts, picked, gates, h


def add_rank_lora(y: Tensor, x: Tensor, *arguments: Any) -> None:
    y += rank_lora_forward(x, *arguments)[0]


def add_fused_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, parts: list[int], *sizes: int,
) -> None:  # fmt: skip
    for at in range(0, len(parts), 3):
        p, begin, end = parts[at : at + 3]
        add_rank_lora(
            y[:, begin:end], x, a[p], b[:, begin:end], router[p], bias[p], places[p], scales[p], adapter_of, *sizes
        )


def rank_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, picked: Tensor, gates: Tensor, h: Tensor, rows: int, ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, da, db, drouter = found = tuple(torch.zeros_like(wide(t)) for t in (x, a, b, router))
    for index, ((first, ranks, row, rows, chosen, gate), scale) in enumerate(
        zip(places.tolist(), scales.tolist(), strict=True)
    ):
        tokens = (adapter_of == index).nonzero()[:, 0]
        X, dY = wide(x[tokens]), wide(grad[tokens])
        A, B, W = (wide(t) for t in (a[first : first + ranks], b[first : first + ranks], router[row : row + rows]))
        hidden, dv, whole = X @ A.T, scale * dY @ B.T, torch.ones(1, dtype=X.dtype, device=X.device)
        if gate != CONSTANT:
            blocks, kept = picked[tokens, :chosen].long(), wide(gates[tokens, :chosen])
            zeros, each = X.new_zeros(len(X), rows), (rows, ranks // rows)
            whole = zeros.scatter(1, blocks, kept).repeat_interleave(each[1], 1)
            dgates = (hidden * dv).unflatten(1, each).sum(2).gather(1, blocks)
            logits = (X @ W.T).gather(1, blocks)
            dlogits = zeros.scatter(1, blocks, gates_backward(dgates, kept, logits, wide(bias)[row + blocks], gate))
            drouter[row : row + rows] += dlogits.T @ X
            dx[tokens] += dlogits @ W
        dx[tokens] += (dv * whole) @ A
        da[first : first + ranks] += (dv * whole).T @ X
        db[first : first + ranks] += scale * (hidden * whole).T @ dY
    dx, da, db, drouter = (g.to(x.dtype) for g in found)
    return dx, da, db, drouter


def gates_backward(dgates: Tensor, gates: Tensor, logits: Tensor, bias: Tensor, gate: int) -> Tensor:
    """Gradient of the logits of picked blocks, all [T, C]; logits of others have none."""
    centred = dgates - (dgates * gates).sum(1, keepdim=True)
    if gate == SOFTMAX:
        return gates * centred
    p = logits.sigmoid()
    kept = p if gate == UNBIASED else (p + bias).clamp_min(SMALLEST)
    slope = p * (1 - p)
    if gate == SIGMOID:
        slope = torch.where(p + bias > SMALLEST, slope, 0.0)
    return slope * centred / kept.sum(1, keepdim=True)
