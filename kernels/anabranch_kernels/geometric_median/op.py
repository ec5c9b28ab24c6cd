"""Geometric median of long rows by two reads of them; and the two reads, on which other robust rules stand too.

1. `centred_gram`: the products of all pairs of rows. 2. A problem of N unknowns, in float64 (solve.py). 3. `combine`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..tensors import described
from . import cpu, reference
from . import solve as by_torch
from .gradient import gradients
from .solve import ANCHOR, COLLINEAR, CONVERGED, MAX_ITER, STATUS, Solution, magnification, recentre

__all__ = [
    "ANCHOR", "COLLINEAR", "CONVERGED", "MAX_ITER", "STATUS", "GeometricMedian", "Solution",
    "centred_gram", "combine", "geometric_median", "resolution", "solve",
]  # fmt: skip

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAGNIFIED = 32  # roundings of the Gram matrix may show so many times in the result before it is taken anew


def _gram_dtype(points: Tensor) -> torch.dtype:
    return torch.float32 if points.device.type == "mps" else torch.float64


_gram = define(
    "centred_gram(Tensor points, Tensor? centre) -> Tensor",
    reference=reference.centred_gram,
    cpu=cpu.centred_gram,
    cuda=lambda *args: import_module(".gpu", __package__).centred_gram(*args),
    fake=lambda points, centre: points.new_empty(
        points.shape[0], points.shape[1], points.shape[1], dtype=_gram_dtype(points)
    ),
)

_combine = define(
    "combine(Tensor points, Tensor coefficients, Tensor? centre) -> Tensor",
    reference=reference.combine,
    cpu=cpu.combine,
    cuda=lambda *args: import_module(".gpu", __package__).combine(*args),
    fake=lambda points, coefficients, centre: points.new_empty(points.shape[0], points.shape[2]),
)

_solve = define(
    "geometric_median_solve(Tensor gram, Tensor weights, float tol, int max_steps, float resolution)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=by_torch.solve,
    cuda=lambda *args: import_module(".gpu_solve", __package__).solve(*args),
    fake=lambda gram, weights, *rest: (
        weights.new_empty(weights.shape),
        weights.new_empty(weights.shape[0]),
        weights.new_empty(weights.shape[0], dtype=torch.int64),
        gram.new_empty(gram.shape),
    ),
)


def solve(gram: Tensor, weights: Tensor, *, tol: float, max_steps: int, resolution: float) -> Solution:
    """Geometric medians from Gram matrices, as solve.py says; on a GPU one launch for B problems of at most 128 points.

    gram        [B, N, N] float64  around any centres
    weights     [B, N] float64     non-negative, some of each problem positive
    resolution  relative rounding of the entries of `gram`

    Raises ValueError for shapes and dtypes that do not fit.
    """
    B, N = gram.shape[:2] if gram.ndim == 3 else (-1, -1)
    if N < 1 or gram.shape[2] != N or list(weights.shape) != [B, N] or weights.dtype != gram.dtype:
        raise ValueError(
            f"gram must be [B, N, N] and weights [B, N] of its dtype, got {described(gram)} and {described(weights)}"
        )
    return Solution(*_solve(gram, weights, tol, max_steps, resolution))


def resolution(dtype: torch.dtype) -> float:
    """Relative rounding of the entries of a Gram matrix of rows of this dtype."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-23


def _median(
    points: Tensor, weights: Tensor, centre: Tensor | None, drop: bool, tol: float, max_steps: int
) -> tuple[Tensor, ...]:
    centre = points[:, 0] if centre is None else centre
    gram, w, dropped = _without_dropped(_gram(points, centre), weights, drop)
    if bool((magnification(gram, w) > MAGNIFIED).any()):
        # The centre is far away, by chance or by malice. Around the best point all that differs can be told apart.
        centre = points[torch.arange(points.shape[0], device=points.device), recentre(gram, w)[0]]
        gram, w, dropped = _without_dropped(_gram(points, centre), weights, drop)
    solution = solve(gram, w, tol=tol, max_steps=max_steps, resolution=resolution(points.dtype))
    point = _combine(points, solution.coefficients, centre)
    return point, solution.coefficients, solution.gap, solution.status, dropped, solution.gram


def _without_dropped(gram: Tensor, weights: Tensor, drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix with zeros for rows that are not finite, the weights likewise, and which these are."""
    w = weights.to(gram.dtype)
    if not bool(((w >= 0) & w.isfinite()).all()):
        raise ValueError("weights must be finite and not negative")
    bad = ~gram.diagonal(dim1=1, dim2=2).isfinite()
    if not drop and bool((bad & (w > 0)).any()):
        b, i = (bad & (w > 0)).nonzero()[0].tolist()
        raise ValueError(
            f"row {i} of problem {b} is not finite, or too far away to be squared ({int(bad.sum())} such rows in all); "
            "non_finite='drop' leaves them out"
        )
    w = torch.where(bad, 0.0, w)
    if bool((w.sum(1) <= 0).any()):
        raise ValueError("every problem needs a finite row of positive weight")
    return torch.where(bad[:, :, None] | bad[:, None, :], 0.0, gram), w, bad


_op = define(
    "geometric_median(Tensor points, Tensor weights, Tensor? centre, bool drop, float tol, int max_steps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_median,
    fake=lambda points, weights, *rest: (
        points.new_empty(points.shape[0], points.shape[2]),
        points.new_empty(points.shape[:2], dtype=_gram_dtype(points)),
        points.new_empty(points.shape[0], dtype=_gram_dtype(points)),
        points.new_empty(points.shape[0], dtype=torch.int64),
        points.new_empty(points.shape[:2], dtype=torch.bool),
        points.new_empty(points.shape[0], points.shape[1], points.shape[1], dtype=_gram_dtype(points)),
    ),
)

_op_backward = define(
    "geometric_median_backward(Tensor grad, Tensor points, Tensor weights, Tensor point, Tensor coefficients,"
    " Tensor status, Tensor dropped, Tensor gram) -> (Tensor, Tensor)",
    reference=gradients,
    fake=lambda grad, points, weights, *rest: (points.new_empty(points.shape), weights.new_empty(weights.shape)),
)


class _GeometricMedian(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: Tensor, weights: Tensor, centre: Tensor | None, drop: bool, tol: float, max_steps: int
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = _op(points, weights, centre, drop, tol, max_steps)
        point, coefficients, _, status, dropped, gram = out
        ctx.save_for_backward(points, weights, point, coefficients, status, dropped, gram)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        return (*_op_backward(grad, *ctx.saved_tensors), None, None, None, None)


_differentiable: Callable[..., tuple[Tensor, ...]] = _GeometricMedian.apply


class GeometricMedian(NamedTuple):
    """Of B problems of N points of D numbers.

    point         [B, D]          dtype of the points
    coefficients  [B, N] float64  of the points in it; they sum to one
    gap_rel       [B] float64     (f(point) - f*) / f(point) is at most this, up to rounding: of float64 in the steps,
                                  of the dtype in `point`. f counts far outliers too: beside one this says little of the
                                  place
    status        [B] int64       index into STATUS: "converged", gap_rel <= tol; "anchor", a given row, bit for bit;
                                  "collinear", the midpoint of a segment of medians; "max_iter", gap_rel > tol
    dropped       [B, N] bool     rows left out because they are not finite, also those of weight zero
    """

    point: Tensor
    coefficients: Tensor
    gap_rel: Tensor
    status: Tensor
    dropped: Tensor


def geometric_median(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    non_finite: str = "raise",
    tol: float = 1e-6,
    max_steps: int = 100,
) -> GeometricMedian:
    """Point that minimises the weighted sum of distances to N points: exact to rounding, with a bound that proves it.

    points      [B, N, D]  B independent problems; float64, float32, bfloat16 or float16
    weights     [B, N]     non-negative, some of each problem positive; any float dtype; ones if None
    centre      [B, D]     dtype of points; anything near them, such as the last round's model; each first row if None.
                           It changes rounding, not the result; one far away costs a third read
    non_finite  "raise" or "drop" rows of positive weight with Inf, NaN or a squared distance above the range of
                float64; rows of weight zero may hold anything
    tol         the gap_rel at which a result counts as converged; steps go on as long as they gain anything
    returns     GeometricMedian; `point` is differentiable once in points and weights, by the implicit function. Where
                the median is a given row the gradient is that row's alone, where it is a midpoint each end's by half

    Raises ValueError for shapes, dtypes and devices that do not fit, and for rows that are not finite. A result that
    is not within tol says so in `status`; nothing is raised for it.

    Equal rows add their weights. N up to about 1500: steps are systems of N unknowns in float64. Memory N^2 beside the
    points. Vardi and Zhang, PNAS 97 (2000); RFA, arXiv 1912.13445, for its use in federated learning.
    """
    _check_points(points)
    B, N = points.shape[:2]
    if N == 0:
        raise ValueError(f"a median needs points, got {list(points.shape)}")
    if weights is None:
        weights = points.new_ones(B, N, dtype=_gram_dtype(points))
    if list(weights.shape) != [B, N] or not weights.is_floating_point() or weights.device != points.device:
        raise ValueError(f"weights must be [{B}, {N}] floats on {points.device}, got {described(weights)}")
    _check_centre(points, centre)
    if non_finite not in ("raise", "drop"):
        raise ValueError(f"non_finite must be 'raise' or 'drop', got {non_finite!r}")
    if not tol > 0 or max_steps < 0:
        raise ValueError(f"tol must be positive and max_steps not negative, got {tol=}, {max_steps=}")
    arguments = (points, weights, centre, non_finite == "drop", tol, max_steps)
    if torch.is_grad_enabled() and (points.requires_grad or weights.requires_grad):
        return GeometricMedian(*_differentiable(*arguments)[:5])
    return GeometricMedian(*_op(*arguments)[:5])


def centred_gram(points: Tensor, centre: Tensor | None = None) -> Tensor:
    """Products of all pairs of rows around a centre, by one read of them.

    points   [B, N, D]  float64, float32, bfloat16 or float16
    centre   [B, D]     dtype of points; zero if None. What is not finite in it counts as zero
    returns  [B, N, N]  float64: <p_i - c, p_j - c>; sums are float32 within tiles of at most 512 columns (float64 for
             float64 points). Rows that are not finite show as Inf or NaN on the diagonal and change no others' entries

    Squares that float32 could not hold are scaled: rows of 1e30 or 1e-30 are as good as others. No gradient.
    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    _check_points(points)
    _check_centre(points, centre)
    gram: Tensor = _gram(points, centre)
    return gram


def combine(points: Tensor, coefficients: Tensor, centre: Tensor | None = None) -> Tensor:
    """c + sum_i a_i (p_i - c), by one read of the rows whose coefficient is not zero.

    points        [B, N, D]  float64, float32, bfloat16 or float16
    coefficients  [B, N]     float64
    centre        [B, D]     dtype of points; zero if None. What is not finite in it counts as zero
    returns       [B, D]     dtype of points; sums are kept in float32 (float64 for float64 points)

    A single coefficient of one copies its row, bit for bit; a coefficient of zero lets its row hold anything. No
    gradient. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    _check_points(points)
    _check_centre(points, centre)
    wanted = _gram_dtype(points)
    if coefficients.shape != points.shape[:2] or coefficients.dtype != wanted or coefficients.device != points.device:
        raise ValueError(
            f"coefficients must be {list(points.shape[:2])} {wanted} on {points.device}, got {described(coefficients)}"
        )
    out: Tensor = _combine(points, coefficients, centre)
    return out


def _check_points(points: Tensor) -> None:
    if points.ndim != 3 or points.dtype not in DTYPES:
        raise ValueError(f"points must be [B, N, D] in one of {list(DTYPES)}, got {described(points)}")


def _check_centre(points: Tensor, centre: Tensor | None) -> None:
    if centre is None:
        return
    B, _, D = points.shape
    if list(centre.shape) != [B, D] or centre.dtype != points.dtype or centre.device != points.device:
        raise ValueError(f"centre must be [{B}, {D}] {points.dtype} on {points.device}, got {described(centre)}")
