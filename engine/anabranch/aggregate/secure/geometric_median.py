"""The geometric median through secure sums: smoothed Weiszfeld steps, one round each. RFA, arXiv 1912.13445

    z' = sum_i w_i x_i / r_i  /  sum_i w_i / r_i,      r_i = max(||x_i - z||, smoothing)

With z known to all, each client makes [(x_i - z) / r_i, smoothing / r_i], numbers from -1 to 1 whatever x_i is, and the
secure sum of these gives z'. A client far away pulls with the same strength as one nearby: no more than its weight.

From the paper       the objective, the smoothing, few steps.
Reconstructed here   steps relative to z, so that fixed point with a clip of one holds every vector without clipping.

What is learned: the two sums of every step, that is the path of z; not the distances r_i, nor the inner products that
the exact geometric median of plain points would need. Precision: r_i far above `smoothing` make small integers, so
choose a smoothing not much below the distances expected, and more fraction bits (Goldilocks holds 40 and more).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from anabranch.aggregate.secure.client import Client
from anabranch.aggregate.secure.local import run_round
from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.server import Server

MOST_STEPS = 4  # each is a round, and shows one sum more


def contribution(vector: Tensor, centre: Tensor, smoothing: float) -> Tensor:
    """What a client shares in one step: [l + 1] float64, for parameters of length l + 1 and a clip of 1.

    vector, centre   [l], finite
    """
    if vector.shape != centre.shape or vector.ndim != 1 or not smoothing > 0:
        raise ValueError(
            f"need a vector and a centre [l] and a smoothing above 0, got {list(vector.shape)}, "
            f"{list(centre.shape)} and {smoothing}"
        )
    pull = vector.double() - centre.double()
    both = torch.cat([pull, torch.full((1,), smoothing, dtype=torch.float64)])
    return both.div(max(float(pull.norm()), smoothing))


def step(centre: Tensor, mean: Tensor, smoothing: float) -> Tensor:
    """The next centre [l] float64, from the weighted mean [l + 1] of all contributions (Outcome.mean)."""
    if not mean[-1] > 0:
        raise ValueError(f"a smoothing of {smoothing} is too small for the distances and the fraction bits")
    return centre.double() + smoothing * mean[:-1] / mean[-1]


def run_steps(
    server: Server,
    clients: Mapping[int, Client],
    vectors: Mapping[int, Tensor],
    parameters: Parameters,
    *,
    centre: Tensor,
    smoothing: float,
    steps: int = 3,
    first_round: int = 1,
) -> Tensor:
    """All steps with all parties in this process: the centre [l] that everybody knows in the end."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be 1 to {MOST_STEPS}, got {steps}")
    if parameters.fixed_point.clip < 1:
        raise ValueError(f"contributions reach 1, got a clip of {parameters.fixed_point.clip}")
    for number in range(first_round, first_round + steps):
        shared = {i: contribution(vector, centre, smoothing) for i, vector in vectors.items()}
        run_round(server, clients, number, shared)
        assert server.outcome is not None
        centre = step(centre, server.outcome.mean(parameters), smoothing)
    return centre
