"""Gradient of the geometric median by the implicit function, exact: the optimum moves so that its own gradient stays 0.

With x the median, r_i = ||x - p_i||, u_i = (x - p_i) / r_i, g the gradient with respect to x and H the Hessian of f:

    z = H^-1 g = (g + A (s D^-1 - G)^-1 A'g) / s,   A = [x - p_i],  G = A'A,  D = diag(w / r^3),  s = sum w / r
    dL/dp_i = w_i / r_i (z - u_i <u_i, z>)          dL/dw_i = -<u_i, z>

The rows are read twice, for A'g and for the result; the rest has N unknowns.
"""

import torch
from torch import Tensor

from .reference import COLUMNS, wide
from .solve import ANCHOR, COLLINEAR, at, curvature, solve_positive


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
    part = _products(grad, points, point, dropped)  # A'g
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
    across = torch.where(follows, 0.0, -x.v * b / x.r**2)
    d_points = torch.empty_like(points, memory_format=torch.contiguous_format)
    columns = zip(*(t.split(COLUMNS, -1) for t in (grad, points, point, d_points)), strict=True)
    for g, rows, middle, out in columns:
        differences = _differences(rows, middle, dropped)
        Ae = torch.where(follows, 0.0, (e[:, :, None] * differences).sum(1))
        shared = ahead[:, :, None] * wide(g)[:, None] + along[:, :, None] * Ae[:, None]
        out.copy_(shared + across[:, :, None] * differences)
    return d_points, d_weights


def _differences(rows: Tensor, middle: Tensor, dropped: Tensor) -> Tensor:
    """x - p_i, float64; zero for rows that take no part."""
    return torch.where(dropped[:, :, None], 0.0, wide(middle)[:, None] - wide(rows))


def _products(grad: Tensor, points: Tensor, point: Tensor, dropped: Tensor) -> Tensor:
    """<x - p_i, g> [B, N]."""
    total = torch.zeros_like(dropped, dtype=wide(grad.new_empty(0)).dtype)
    for g, rows, middle in zip(*(t.split(COLUMNS, -1) for t in (grad, points, point)), strict=True):
        total += (_differences(rows, middle, dropped) @ wide(g)[:, :, None])[:, :, 0]
    return total
