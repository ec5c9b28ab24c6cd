"""Figures of the study: their arithmetic against SciPy's, and what the words claim."""

import pytest
from scipy.stats import ttest_rel

from anabranch.tune.smora_figures import collect, markdown, verdict
from anabranch.tune.smora_study import SUITES, balanced, compared, tuning, varied
from anabranch.tune.teacher_run import METHODS

SEEDS = [0, 1, 2]


@pytest.fixture
def parts():
    """Runs that nobody trained: what is left falls by method and varies by seed."""
    order = list(METHODS)

    def found(run):
        left = (len(order) - order.index(run.method)) / 20 + 0.001 * run.seed * (1 + order.index(run.method))
        use = {
            "variation": 0.5 - 100 * run.make().settings.balance,
            "dead": 0.25,
            "within": 0.4 + 0.01 * run.seed,
            "between": 0.1,
        }
        return {"left": left, **(dict.fromkeys(use) if run.method.startswith("lora") else use)}

    runs = compared({(suite, method): 1e-3 for suite in SUITES.values() for method in order}, SEEDS, 10)
    even, others = balanced(runs), varied(runs, SEEDS)
    every = [*runs, *even, *(run for some in others.values() for run in some)]
    return {
        "suites": SUITES, "tried": {run: found(run) for run in tuning(10)}, "runs": runs, "balanced": even,
        "varied": others, "done": {run: found(run) for run in every},
    }  # fmt: skip


def test_differences_are_paired_by_seed_as_scipy_pairs_them(parts):
    figures = collect(**parts)
    left = {(row["suite"], row["method"]): row["left"] for row in figures["methods"]}
    for row in figures["paired"]:
        a, b = (left[row["suite"], name] for name in row["pair"])
        low, high = ttest_rel(a, b).confidence_interval(0.95)
        assert row["mean"] == pytest.approx((low + high) / 2, abs=1e-4)
        assert row["half_width_95"] == pytest.approx((high - low) / 2, rel=1e-3, abs=1e-4)  # four digits of t


def test_what_is_explained_is_a_quotient_of_each_seed(parts):
    figures = collect(**parts)
    left = {row["method"]: row["left"] for row in figures["methods"] if row["suite"] == "one distribution"}
    row = figures["explained"][0]
    expected = [(100 - x) / (100 - y) for x, y in zip(left["smora"], left["lora-64"], strict=True)]
    assert row["differences"] == pytest.approx(expected, abs=1e-5)


def test_use_is_compared_with_no_balance(parts):
    rows = {(r["suite"], r["method"], r["balance"]): r for r in collect(**parts)["balance"]}
    assert len(rows) == 2 * 6
    assert rows["own distributions", "smora", 1e-3]["less_variation_than_off"]["mean"] == pytest.approx(0.1)
    assert rows["own distributions", "smora, softmax", 0.0]["less_variation_than_off"]["mean"] == 0.0


def test_the_page_says_what_the_figures_say(parts):
    page = markdown(collect(**parts))
    assert "| one distribution | smora minus lora-8 | -29.40 | -30.89 to -27.91 | better |" in page
    assert "| own distributions | smora | 0.410 | 0.100 | +0.310 | +0.285 to +0.335 |" in page
    better = "lora-64, experts 8x8, Switch, blocks of 4, blocks of 2"
    assert f"| one distribution | twice the steps | 40.20 | 30.40 | 25.50 | 20.60 | 15.70 | {better} | – |" in page
    assert "means of 3 seeds after 10 steps of 128 tokens" in page


def test_one_seed_claims_nothing(parts):
    parts["runs"] = [run for run in parts["runs"] if run.seed == 0]
    parts["balanced"] = balanced(parts["runs"])
    parts["varied"] = varied(parts["runs"], [0])
    page = markdown(collect(**parts))
    assert "| better |" not in page
    assert "not told apart" in page


def test_a_run_that_diverged_is_no_figure(parts):
    run = parts["runs"][-1]
    parts["done"][run] = {**parts["done"][run], "left": None}
    with pytest.raises(ValueError, match="smora, softmax diverged on seed 2"):
        collect(**parts)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [(-1.0, 0.5, "better"), (1.0, 0.5, "worse"), (1.0, 1.0, "not told apart"), (1.0, None, "not told apart")],
)
def test_a_verdict_needs_an_interval_without_zero(mean, half, said):
    assert verdict({"mean": mean, "half_width_95": half}) == said
