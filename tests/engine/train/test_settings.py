"""Settings, and the command line that says the same."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from anabranch.train.command import HELP, add_arguments, duration_s, settings_from
from anabranch.train.settings import OPERATIONAL, LMSettings, command_line


def parse(line: str) -> LMSettings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args(shlex.split(line)))


@pytest.mark.parametrize(
    "settings",
    [
        LMSettings(out=Path("runs/a")),
        LMSettings(out=Path("a b"), text=("x.txt", "src/**/*.py"), lr=1e-3, k_heads=1, progress=False, plot=True),
        LMSettings(out=Path("a"), q_intermediate_size=None, init_std=0.02, augq_residual=False, time_limit_s=90.0),
        LMSettings(out=Path("a"), weights="float32", checkpoint_every_s=5.0, seed=3),
    ],
)
def test_a_command_line_parses_back_to_its_settings(settings):
    line = command_line(settings)
    assert line.startswith("anabranch train-lm ")
    assert parse(line.removeprefix("anabranch train-lm ")) == settings


def test_every_field_has_an_option():
    assert set(HELP) | {"out", "text"} == {field.name for field in fields(LMSettings)}
    assert {field.name for field in fields(LMSettings)} >= OPERATIONAL


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_times_have_units(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3m", "1d", "1m30s"])
def test_other_times_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="45m"):
        duration_s(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 10, "steps": 10}, "below the 10 steps, got 10"),
        ({"final_lr": 2.0}, "final_lr"),
        ({"weights": "int8"}, "'bfloat16' or 'float32', got 'int8'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LMSettings(out=Path("a"), **change)
