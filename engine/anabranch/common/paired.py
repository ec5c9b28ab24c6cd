"""Figures of a few seeds: their mean, their spread, and what a difference within seeds says."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev
from typing import Any

# Two-sided 95 % point of Student's t by degrees of freedom (one less than the number of seeds).
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return {"mean": round(mean(values), 5), "sd": round(stdev(values), 5) if len(values) > 1 else None}


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean difference with the half width of its 95 % interval by Student's t (None for one seed, or above ten)."""
    n = len(differences)
    factor = T_95.get(n - 1)
    half = None if factor is None else round(factor * stdev(differences) / sqrt(n), 5)
    return {"differences": [round(x, 5) for x in differences], **spread(differences), "half_width_95": half}
