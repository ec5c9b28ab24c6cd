"""Gradient of the geometric median by the implicit function, exact: the optimum moves so that its own gradient stays 0.

With x the median, r_i = ||x - p_i||, u_i = (x - p_i) / r_i, g the gradient with respect to x and H the Hessian of f:

    z = H^-1 g = (g + A (s D^-1 - G)^-1 A'g) / s,   A = [x - p_i],  G = A'A,  D = diag(w / r^3),  s = sum w / r
    dL/dp_i = w_i / r_i (z - u_i <u_i, z>)          dL/dw_i = -<u_i, z>

The rows are read twice, for A'g and for the result; the rest has N unknowns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..memory import prefer_huge_pages
from ..tensors import wide
from .reference import COLUMNS
from .solve import ANCHOR, COLLINEAR, at, curvature, solve_positive

CACHED = 1 << 19  # numbers, of all rows, that are differences at a time: fewer would be more calls than work


def gradients(
    grad: Tensor,
    points: Tensor,
    weights: Tensor,
    point: Tensor,
    coefficients: Tensor,
    status: Tensor,
    dropped: Tensor,
    gram: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of points [B, N, D] and weights [B, N], each in its own dtype."""
    w = torch.where(dropped, 0.0, weights.to(gram.dtype))
    total = w.sum(1, keepdim=True)
    x = at(gram, w / total, coefficients)
    M, root = curvature(gram, x)
    s = x.v.sum(1, keepdim=True)
    some_dropped = dropped if bool(dropped.any()) else None
    part = _products(grad, points, point, some_dropped)  # A'g
    inner = solve_positive(M, root * part)
    e = root * inner  # (s D^-1 - G)^-1 A'g, through the symmetric M = s I - D^1/2 G D^1/2
    G = gram - x.Ka[:, :, None] - x.Ka[:, None, :] + x.q[:, None, None]
    b = (part + (G @ e[:, :, None])[:, :, 0]) / s  # A'z
    # Where the answer is a given row, or halfway between two, it follows these and no others.
    follows = ((status == ANCHOR) | (status == COLLINEAR) | (coefficients == 1).any(1))[:, None]
    d_weights = torch.where(follows | dropped, 0.0, -b / x.r / total).to(weights.dtype)
    # Row i of the result: ahead_i g + along_i A e + across_i (x - p_i).
    ahead = torch.where(follows, coefficients, x.v / s)
    along = torch.where(follows, 0.0, x.v / s)
    e = torch.where(follows, 0.0, e)  # it may be NaN there
    across = torch.where(follows, 0.0, -x.v * b / x.r**2)
    d_points = prefer_huge_pages(torch.empty_like(points, memory_format=torch.contiguous_format))
    shared = torch.stack([ahead, along], 2)  # of g and of A e
    room = _room(points)
    for g, rows, middle, out in _in_columns(grad, points, point, d_points):
        differences = _differences(rows, middle, some_dropped, room)
        part_e, part_shared, part_across = (t.to(differences.dtype) for t in (e, shared, across))
        both = torch.cat([g.to(differences.dtype)[:, None], part_e[:, None] @ differences], 1)
        out.copy_(differences.mul_(part_across[:, :, None]).baddbmm_(part_shared, both))
    return d_points, d_weights


def _columns(points: Tensor) -> int:
    return COLUMNS if points.is_cuda else max(256, CACHED // points.shape[1] // max(1, points.shape[0]))


def _in_columns(grad: Tensor, points: Tensor, point: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some columns of each at a time, so few that what is made of them stays in a cache of the CPU."""
    return zip(*(t.split(_columns(points), -1) for t in (grad, points, point, *more)), strict=True)


def _differences(rows: Tensor, middle: Tensor, dropped: Tensor | None, room: Tensor) -> Tensor:
    """x - p_i, float32 or wider, written to `room`; zero for rows that take no part."""
    result = room[:, :, : rows.shape[2]]
    torch.sub(middle.to(room.dtype)[:, None], rows, out=result)
    return result if dropped is None else result.masked_fill_(dropped[:, :, None], 0.0)


def _room(points: Tensor) -> Tensor:
    """For differences of some columns: memory that is asked for anew each time costs more than what is done in it."""
    B, N, D = points.shape
    return points.new_empty(B, N, min(_columns(points), D), dtype=torch.promote_types(points.dtype, torch.float32))


def _products(grad: Tensor, points: Tensor, point: Tensor, dropped: Tensor | None) -> Tensor:
    """<x - p_i, g> [B, N]; sums are in the width of the differences within columns taken at a time, then float64."""
    total = wide(points.new_zeros(points.shape[:2]))
    room = _room(points)
    for g, rows, middle in _in_columns(grad, points, point):
        differences = _differences(rows, middle, dropped, room)
        total += (differences @ g.to(differences.dtype)[:, :, None])[:, :, 0]
    return total
