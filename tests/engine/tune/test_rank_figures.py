"""Tables of the study of ranks: their arithmetic and their wording."""

import pytest
from scipy.stats import ttest_1samp

from anabranch.tune.rank_figures import draw, interval, markdown, reading, shown


def texts():
    names = [f"{block}.{part}" for block in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    common = {"task": "ag-news", "seconds": 2.0, "choosing_s": 0.01}
    return [
        run
        for seed in (0, 1)
        for run in (
            {"method": "LoRA-4", "seed": seed, "accuracy": 0.5, "ranks": {}, **common},
            {
                "method": "TriAdapt", "seed": seed, "accuracy": 0.7 + 0.1 * seed,
                "ranks": dict(zip(names, [1, 3, 5, 7], strict=True)), **common,
            },
        )
    ]  # fmt: skip


def test_the_interval_is_students():
    values = [0.1, 0.4, 0.35, 0.2, 0.3]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    centre, half = interval(values)
    assert (centre - half, centre + half) == pytest.approx((low, high))
    assert shown([0.25]) == "0.250"
    assert shown([]) == "–"


def test_a_reading_says_no_more_than_the_interval():
    assert reading("a", "b", [0.1, 0.11, 0.12]) == "**a** leaves more than **b**: +0.110 ± 0.025."
    assert "leaves less" in reading("a", "b", [-0.1, -0.11, -0.12])
    assert "cannot be told apart" in reading("a", "b", [-0.1, 0.11, 0.12])
    assert "cannot be told apart" in reading("a", "b", [0.3])


def test_ranks_are_averaged_by_block_and_by_kind(tmp_path):
    lines = markdown({"texts": texts()}).splitlines()
    header, row = (next(line for line in lines if line.startswith(start)) for start in ("| method", "| TriAdapt"))
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["block 0"].startswith("2.0")
    assert cells["block 1"].startswith("6.0")
    assert cells["q_proj"].startswith("3.0")
    assert cells["accuracy"].startswith("0.750 ± ")
    assert "| LoRA-4 | 0.500 ± 0.000 | 2.0 | – | – | – |" in "\n".join(lines)
    draw({"texts": texts()}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
