"""Settings name what is wrong with them, and the command that stands for them."""

import shlex
from pathlib import Path

import pytest

from anabranch.cli import build_parser
from anabranch.convert.settings import OPERATIONAL, ConvertSettings, command_line

HEAL = {"heal": 100, "text": ("a.txt",)}


def settings(**changes: object) -> ConvertSettings:
    return ConvertSettings(**{"model": Path("in"), "out": Path("out"), "key_heads": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "median"}, r"unknown method 'median'; choose one of \['svd', 'mean'\]"),
        ({"method": "mean", "calibrate": ("a.txt",)}, "'mean' has nothing to calibrate"),
        ({"key_heads": 0}, "key_heads must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2 tokens, got 1"),
        ({"heal": -1}, "heal must not be negative, got -1"),
        ({**HEAL, "lr": 0.0}, "lr must be positive, got 0.0"),
        ({"held_out": 1.5}, "held_out is a share and must be from 0 to 1, got 1.5"),
        ({"heal": 10}, "healing needs text to train on: give --text FILES"),
        ({"resume": True}, "only healing can be resumed or drawn: give --heal STEPS"),
        ({"plot": True}, "only healing can be resumed or drawn"),
        ({**HEAL, "warmup": 100}, "warmup must be from 0 to below the 100 steps of healing, got 100"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_recipe_is_what_decides_the_result():
    recipe = settings(**HEAL).recipe()
    assert recipe["steps"] == 100
    assert "heal" not in recipe
    assert not OPERATIONAL & recipe.keys()


def test_the_command_line_is_parsed_back_into_the_settings():
    wanted = settings(
        **HEAL, calibrate=("b c.txt", "d.txt"), lr=1e-3, plot=True, progress=False, checkpoint_every_s=5.0,
        state=Path("elsewhere"), context=64, beta2=0.9,
    )  # fmt: skip
    args = build_parser().parse_args(shlex.split(command_line(wanted))[1:])
    values = {name: getattr(args, name) for name in ConvertSettings.__dataclass_fields__}
    assert ConvertSettings(**{**values, "text": tuple(args.text), "calibrate": tuple(args.calibrate)}) == wanted
