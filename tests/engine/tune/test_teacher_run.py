"""Runs against teachers: gradients of routers, fair starts, and what is measured."""

import json

import pytest
import torch
from torch.testing import assert_close

from anabranch.adapters.rank_lora import RankLora
from anabranch.tune.teacher_run import METHODS, SCALE, TeacherRun, learn, measured, overlaps
from anabranch.tune.teachers import Suite, make_teachers

SMALL = Suite(tasks=2, groups=1, rank=1, shared=0, width=16, code=4.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_start_with_the_same_scale_of_a_rank_in_use(name):
    """With A and B all ones and routers zero, every token's output is scale * width * ranks in use."""
    layer = METHODS[name].layer(16, seeded())
    for weight, value in ((layer.a, 1.0), (layer.b, 1.0), (layer.router, 0.0)):
        torch.nn.init.constant_(weight, value)
    ranks = 64 if name == "lora-64" else 8
    assert_close(layer(torch.ones(3, 16)), torch.full((3, 16), SCALE * 16 * ranks))


def router_gradient(layer):
    torch.nn.init.normal_(layer.b, generator=seeded(2))
    layer(torch.randn(32, 16, generator=seeded(1))).square().sum().backward()
    return float(layer.router.grad.abs().max())


def test_a_single_normalised_gate_teaches_its_router_nothing_and_switch_does():
    """Why the study has two kinds of eight experts."""
    assert router_gradient(METHODS["experts 8x8"].layer(16, seeded())) == 0.0
    assert router_gradient(METHODS["experts 8x8, Switch"].layer(16, seeded())) > 0.0
    assert router_gradient(METHODS["blocks of 4"].layer(16, seeded())) > 0.0


def test_switch_is_the_loop_over_experts():
    method = METHODS["experts 8x8, Switch"]
    layer = method.layer(16, seeded())
    torch.nn.init.normal_(layer.b, generator=seeded(2))
    layer.bias += torch.randn(8, generator=seeded(3))
    x = torch.randn(40, 16, generator=seeded(1))
    logits = x @ layer.router.T
    expected = torch.zeros(40, 16)
    for token in range(40):
        expert = int((logits[token] + layer.bias).argmax())
        rows = slice(8 * expert, 8 * expert + 8)
        gate = logits[token].softmax(0)[expert]
        expected[token] = method.settings.alpha * gate * (layer.a[rows] @ x[token]) @ layer.b[rows]
    assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_a_function_of_its_settings(name):
    run = TeacherRun(suite=SMALL, method=name, lr=1e-2, steps=12, batch=16)
    once, again = learn(run), learn(run)
    assert once == again
    json.dumps(run.recipe())
    assert once["left"] > 0
    assert (once["variation"] is None) == name.startswith("lora")


def test_more_ranks_than_all_teachers_have_learn_them_where_one_map_can():
    """Contents in the teachers' own directions, codes of no length: 64 ranks are enough."""
    suite = Suite(tasks=2, groups=1, rank=1, shared=0, width=16, code=0.0, own=1.0)
    assert learn(TeacherRun(suite=suite, method="lora-64", lr=1e-2, steps=200, batch=32))["left"] < 0.01


def test_routing_by_rank_passes_the_best_single_map():
    """Two tasks with contents of one distribution: one map leaves a half, the mean of two unrelated ones."""
    run = TeacherRun(suite=SMALL, method="smora", lr=1e-2, steps=150, batch=64)
    assert learn(run)["left"] < 0.25


def test_a_run_that_diverges_has_no_result():
    run = TeacherRun(suite=SMALL, method="experts 8x8, Switch", lr=1e30, steps=4, batch=8)
    assert learn(run)["left"] is None


def test_use_is_measured_by_task():
    """A router that reads the codes: task 0 picks ranks 0..7, task 1 ranks 8..15, nobody the others."""
    suite = Suite(tasks=2, groups=1, rank=1, shared=0, width=64, code=100.0)
    teachers = make_teachers(suite, seeded())
    layer: RankLora = METHODS["smora"].layer(64, seeded())
    with torch.no_grad():
        layer.router.zero_()
        for task in range(2):
            layer.router[8 * task : 8 * task + 8] = teachers.codes[task] / 1000
            layer.router[16:] -= teachers.codes[task] / 1000
    found = measured(layer, suite, teachers, seeded(1))
    assert found["left"] == 1.0  # B is zero
    assert found["dead"] == 48 / 64
    counts = torch.tensor([0.5] * 16 + [0.0] * 48)
    assert found["variation"] == pytest.approx(float(counts.std(correction=0) / counts.mean()), rel=0.01)
    assert found["within"] == 0.0
    assert found["between"] is None  # there is one group


def test_overlaps_are_averaged_over_pairs_within_and_between_groups():
    suite = Suite(tasks=4, groups=2, rank=1, shared=0, width=64)
    used = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    assert overlaps(used, suite) == {"within": 0.5, "between": (0 + 0 + 0.5 + 0) / 4}


@pytest.mark.parametrize(
    ("wrong", "said"), [({"method": "x"}, "unknown method"), ({"lr": 0.0}, "lr > 0"), ({"steps": 0}, "steps, batch")]
)
def test_what_cannot_be_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        TeacherRun(**wrong)
