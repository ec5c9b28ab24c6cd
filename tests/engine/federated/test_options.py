"""Options as texts and as TOML's values become what the dataclass declares, or a sentence that says what it wants."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from anabranch.federated.options import make, pairs_of


@dataclass(frozen=True, kw_only=True)
class Rule:
    name: Literal["mean", "median"] = "mean"
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class Own:
    mu: float = 0.1
    steps: int = 3
    squared: bool = True
    widths: tuple[int, ...] = (64,)
    pair: tuple[float, float] = (1.0, 2.0)
    out: Path | None = None
    rule: Rule = field(default_factory=Rule)
    mean: Rule | None = None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Own()),
        ({"mu": "0.5", "steps": "7", "squared": "no"}, Own(mu=0.5, steps=7, squared=False)),
        ({"mu": 1, "squared": False, "widths": [8, 9]}, Own(mu=1.0, squared=False, widths=(8, 9))),
        ({"widths": "8,9", "pair": "3,4", "out": "here"}, Own(widths=(8, 9), pair=(3.0, 4.0), out=Path("here"))),
        ({"rule.name": "median", "rule.keep": "2"}, Own(rule=Rule(name="median", keep=2))),
        ({"rule": {"name": "median"}, "rule.keep": "none"}, Own(rule=Rule(name="median"))),
        ({"mean.keep": "2"}, Own(mean=Rule(keep=2))),
        ({"mean": {}}, Own(mean=Rule())),
    ],
)
def test_values_become_what_is_declared(given, expected):
    made = make(Own, given, what="own")
    assert made == expected
    assert [type(value) for value in vars(made).values()] == [type(value) for value in vars(expected).values()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nu": "1"}, r"own has no option 'nu'; its options are mu \(0.1\), steps \(3\), .* rule\.NAME, mean\.NAME"),
        ({"mu.x": "1"}, "no option 'mu.x'"),
        ({"steps": "1.5"}, "own: steps must be int, got '1.5'"),
        ({"steps": 1.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"squared": "maybe"}, "squared must be bool"),
        ({"pair": "1,2,3"}, "pair must be"),
        ({"mu": [1]}, "mu must be float"),
        ({"rule.name": "mode"}, r"own: rule: name must be one of \['mean', 'median'\]"),
        ({"rule.last": "1"}, "own: rule has no option 'last'"),
        ({"mean": "median"}, "own: mean has options of its own, as mean.NAME=VALUE, got 'median'"),
        ({"mean.name": "mode"}, "own: mean: name must be one of"),
    ],
)
def test_what_is_not_declared_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        make(Own, given, what="own")


def test_pairs_are_written_with_an_equals_sign():
    assert pairs_of(["mu=0.1", "drop-last = yes"]) == {"mu": "0.1", "drop_last": "yes"}
    with pytest.raises(ValueError, match="NAME=VALUE, got 'mu'"):
        pairs_of(["mu"])
