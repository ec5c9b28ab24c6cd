"""Adapters one after another, in float64, all ranks computed and those not picked multiplied by zero."""

import torch
from torch import Tensor

SMALLEST = 2.0**-20  # of a biased score: gates are positive whatever the bias


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def route(logits: Tensor, bias: Tensor, chosen: int, gate: int) -> tuple[Tensor, Tensor]:
    """Blocks picked by each token [T, chosen], rising, and their gates. gate: index into op.GATES, not constant."""
    scores = logits if gate == 1 else logits.sigmoid()
    biased = scores + bias
    best = biased.detach().sort(dim=1, descending=True, stable=True).indices[:, :chosen].sort(dim=1).values
    if gate == 1:
        return best, biased.gather(1, best).softmax(1)
    kept = (biased.clamp_min(SMALLEST) if gate == 2 else scores).gather(1, best)
    return best, kept / kept.sum(1, keepdim=True)


def _branch(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, place: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One adapter: y, picked blocks, their gates, <A_i, x> of the ranks in them."""
    first, ranks, row, rows, chosen, gate = place
    h = x @ a[first : first + ranks].T
    if gate == 0:
        return scale * h @ b[first : first + ranks], h.new_empty(len(x), 0).long(), h.new_empty(len(x), 0), h
    picked, gates = route(x @ router[row : row + rows].T, bias[row : row + rows], chosen, gate)
    block = ranks // rows
    whole = torch.zeros_like(h[:, ::block]).scatter(1, picked, gates).repeat_interleave(block, 1)
    of_picked = (picked[:, :, None] * block + torch.arange(block, device=x.device)).flatten(1)
    return scale * (h * whole) @ b[first : first + ranks], picked, gates, h.gather(1, of_picked)


def rank_lora_forward(
    x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor, adapter_of: Tensor,
    chosen: int, active: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    T = len(x)
    y, counts = x.new_zeros(T, b.shape[1]), x.new_zeros(len(router), dtype=torch.int64)
    picked = x.new_full((T, chosen), -1, dtype=torch.int32)
    gates, h = x.new_zeros(T, chosen, dtype=wide), x.new_zeros(T, active, dtype=wide)
    weights = (_wide(a), _wide(b), _wide(router), _wide(bias))
    for index, (place, scale) in enumerate(zip(places.tolist(), scales.tolist(), strict=True)):
        tokens = (adapter_of == index).nonzero()[:, 0]
        branch, blocks, gate, hidden = _branch(_wide(x[tokens]), *weights, place, scale)
        y[tokens] = branch.to(y.dtype)
        picked[tokens, : blocks.shape[1]] = blocks.int()
        gates[tokens, : blocks.shape[1]] = gate.to(wide)
        h[tokens, : hidden.shape[1]] = hidden.to(wide)
        row, rows = place[2:4]
        counts[row : row + rows] += blocks.flatten().bincount(minlength=rows) if rows else 0
    return y, counts, picked, gates, h


def rank_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, places: Tensor, scales: Tensor,
    adapter_of: Tensor, picked: Tensor, gates: Tensor, h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    leaves = [_wide(t).detach().requires_grad_() for t in (x, a, b, router)]
    wide_x, weights = leaves[0], (leaves[1], leaves[2], leaves[3], _wide(bias))
    with torch.enable_grad():
        total = wide_x.new_zeros(())
        for index, (place, scale) in enumerate(zip(places.tolist(), scales.tolist(), strict=True)):
            tokens = (adapter_of == index).nonzero()[:, 0]
            y = _branch(wide_x[tokens], *weights, place, scale)[0]
            total = total + (y * _wide(grad[tokens])).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True) if len(places) else None
    if found is None:
        return x.new_zeros(x.shape), a.new_zeros(a.shape), b.new_zeros(b.shape), router.new_zeros(router.shape)
    dx, da, db, drouter = (g.to(t.dtype) for g, t in zip(found, (x, a, b, router), strict=True))
    return dx, da, db, drouter
