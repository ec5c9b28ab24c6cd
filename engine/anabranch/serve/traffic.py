"""Sums over all requests, as cheap to keep as an addition: they become metrics only when somebody asks."""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class Histogram:
    """How many values were at most each bound; a last place counts those above all of them."""

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[int]:
        return list(accumulate(self.counts))


@dataclass(slots=True)
class Traffic:
    """What has passed through, for the metrics. The engine's thread writes busy_s and between_s, the loop the rest.

    busy_s      seconds in which there was something to compute
    first_s     from the arrival of a request to its first token
    between_s   between two tokens of a sample
    whole_s     from arrival to the end
    """

    busy_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    rejected: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "error", "abort"), 0))
    first_s: Histogram = field(default_factory=lambda: Histogram(FIRST_S))
    between_s: Histogram = field(default_factory=lambda: Histogram(BETWEEN_S))
    whole_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
