"""Teachers of known rank: what can be learnt of them, and that growth told what is missing places ranks well."""

import pytest
import torch

from anabranch.tune.rank_teachers import TeacherSettings, learn, parameters, spearman, teachers, variants

SMALL = TeacherSettings(layers=4, width=12, reference=2, steps=150, batch=32, lr=3e-2, looks=15)


def test_teachers_have_their_ranks_and_equal_singular_values():
    for m, dW in enumerate(teachers(SMALL, 0), 1):
        values = torch.linalg.svdvals(dW)
        torch.testing.assert_close(values[:m], torch.ones(m))
        assert values[m:].max() < 1e-5
    assert not torch.equal(teachers(SMALL, 0)[0], teachers(SMALL, 1)[0])


@pytest.mark.parametrize("method", ["LoRA-2", "LoRA-3"])
def test_uniform_lora_reaches_what_its_ranks_allow(method):
    """Of the 10 directions of ranks 1 to 4, LoRA-2 leaves 0 + 0 + 1 + 2 and LoRA-3 one."""
    run = learn(SMALL, method, *variants(SMALL)[method], 0)
    assert run.unlearnt == pytest.approx({"LoRA-2": 0.3, "LoRA-3": 0.1}[method], abs=0.01)
    assert run.order is None
    assert run.ranks == [int(method[-1])] * 4
    assert run.parameters == sum(run.ranks) * 24


def test_growth_by_what_is_missing_follows_the_true_ranks():
    run = learn(SMALL, "linear, by lack", *variants(SMALL)["linear, by lack"], 0)
    assert sum(run.ranks) == 8
    assert run.foresight == 1.0
    assert run.order > 0.7
    assert run.unlearnt < 0.25
    assert len(run.course) == 15


def test_every_variant_ends_with_the_budget():
    short = TeacherSettings(layers=3, width=8, reference=2, steps=20, batch=8, looks=10)
    steps = []
    for method, (made, by) in variants(short).items():
        run = learn(short, method, made, by, 1, lambda: steps.append(1))
        assert sum(run.ranks) == (9 if method == "LoRA-3" else 6)
    assert len(steps) == 20 * len(variants(short))


def test_a_run_is_a_function_of_its_seed():
    short = TeacherSettings(layers=3, width=8, reference=2, steps=20, batch=8, looks=10)
    made, by = variants(short)["linear, by probe"]
    one, same, other = (learn(short, "probed", made, by, seed) for seed in (1, 1, 2))
    assert (one.course, one.ranks) == (same.course, same.ranks)
    assert one.course != other.course


def test_parameters_count_what_lives():
    made = {name: one for name, (one, _) in variants(SMALL).items()}
    assert parameters(made["linear"], [1, 4], 12) == 2 * 12 * 5 + 1 + 16
    assert parameters(made["AdaLoRA"], [1, 4], 12) == 2 * 12 * 5 + 5


def test_ranks_that_are_all_equal_have_no_order():
    assert spearman([1, 2, 3], [5, 5, 5]) is None
    assert spearman([1, 2, 3], [9, 5, 1]) == -1.0
