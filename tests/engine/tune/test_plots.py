"""Pictures are drawn of whatever a log holds."""

import json

import pytest
from PIL import Image

from anabranch.tune.plots import draw

LAYERS = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("q_proj", "v_proj")]


@pytest.fixture
def log(tmp_path):
    def write(rows):
        path = tmp_path / "loss.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def rows(count, **more):
    base = [{"step": 10 * n, "tokens": 1000 * n, "train_loss": 2.0 / n} for n in range(1, count + 1)]
    return [{**row, **{key: value(row["step"]) for key, value in more.items()}} for row in base]


def usage(step):
    return {name: {"cv": 0.5, "unused": 0.25, "counts": [step, 0, 3, 4]} for name in LAYERS}


@pytest.mark.parametrize("count", [1, 2, 12])
def test_ranks_and_experts_get_pictures_of_their_own(log, count):
    draw(log(rows(count, layer_ranks=lambda step: dict.fromkeys(LAYERS, step), ranks=lambda step: step)))
    draw(log(rows(count, usage=usage, cv=lambda step: 1.0, unused=lambda step: 0.2)))
    for name in ("loss", "ranks", "experts"):
        with Image.open(log([]).with_name(f"{name}.png")) as picture:
            assert len(picture.convert("L").getcolors(10**6)) > 20  # not blank


def test_a_loss_alone_is_one_picture(log, tmp_path):
    draw(log(rows(3)))
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss.png"]


def test_a_log_without_rows_is_left_alone(log, tmp_path):
    draw(tmp_path / "loss.jsonl")
    draw(log([]))
    assert not list(tmp_path.glob("*.png"))
