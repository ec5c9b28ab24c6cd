"""Teachers: their ranks, what they share, and what their tokens look like."""

from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from anabranch.tune.teachers import Suite, draw, make_teachers


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(teachers):
    """[N, D, D], which make y of x."""
    return torch.einsum("nro,nrd->nod", teachers.outputs.double(), teachers.inputs.double())


@pytest.mark.parametrize(("rank", "shared", "groups"), [(4, 2, 4), (3, 0, 2), (2, 2, 1), (1, 0, 8)])
def test_a_teacher_has_its_rank_and_shares_with_its_group_alone(rank, shared, groups):
    suite = Suite(rank=rank, shared=shared, groups=groups, width=64)
    weights = maps(make_teachers(suite, seeded()))
    ranks = torch.linalg.matrix_rank(weights, atol=1e-5)
    assert ranks.tolist() == [rank] * suite.tasks
    for a, b in combinations(range(suite.tasks), 2):
        common = shared if suite.group(a) == suite.group(b) else 0
        assert int(torch.linalg.matrix_rank(torch.cat([weights[a], weights[b]]), atol=1e-5)) == 2 * rank - common
    together = torch.linalg.matrix_rank(weights.flatten(0, 1), atol=1e-5)
    assert int(together) == suite.components


def test_no_teacher_reads_a_code():
    suite = Suite(width=64, code=3.0)
    teachers = make_teachers(suite, seeded())
    assert_close(teachers.codes @ teachers.codes.T, 9 * torch.eye(suite.tasks), atol=1e-5, rtol=0)
    assert (maps(teachers) @ teachers.codes.double().T).abs().max() < 1e-5


@pytest.mark.parametrize("own", [0.0, 0.9, 1.0])
def test_targets_are_the_teachers_of_the_content(own):
    suite = Suite(width=64, own=own)
    teachers = make_teachers(suite, seeded())
    x, y, task = draw(suite, teachers, 500, seeded(1))
    exact = torch.einsum("tod,td->to", maps(teachers)[task], x.double())
    assert set(task.tolist()) == set(range(suite.tasks))
    ratio = float(y.double().norm() / exact.norm())
    assert_close(y.double(), ratio * exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("own", [0.0, 0.5, 0.9])
def test_energies_are_as_said(own):
    """Means of 20000 tokens: a sum of squares of n normals has relative spread sqrt(2 / n); five of those."""
    suite = Suite(width=64, own=own)
    teachers = make_teachers(suite, seeded())
    x, y, task = draw(suite, teachers, 20_000, seeded(1))
    content = x - teachers.codes[task]
    few = 5 * (2 / (20_000 * suite.rank)) ** 0.5
    assert float(content.square().sum(1).mean()) == pytest.approx(suite.width, rel=few)
    assert float(y.square().sum(1).mean()) == pytest.approx(suite.rank, rel=few)
    within = torch.einsum("td,trd->tr", content, teachers.inputs[task]).square().sum(1).mean()
    assert float(within) == pytest.approx(suite.own * suite.width + (1 - suite.own) * suite.rank, rel=few)


def test_one_linear_map_follows_tasks_with_contents_of_their_own_and_no_others():
    """The best one by least squares, fitted on 4000 tokens and measured on others."""
    left = {}
    for own in (0.0, 1.0):
        suite = Suite(width=64, own=own, code=0.0, shared=0)
        teachers = make_teachers(suite, seeded())
        fitted, measured = (draw(suite, teachers, 4000, seeded(seed)) for seed in (1, 2))
        best = torch.linalg.lstsq(fitted.x, fitted.y, driver="gelsd").solution
        left[own] = float((measured.x @ best - measured.y).square().sum() / measured.y.square().sum())
    assert left[1.0] < 1e-6
    assert left[0.0] > 0.8  # the mean of eight unrelated maps explains an eighth


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"groups": 3}, "multiple of groups"),
        ({"shared": 5}, "shared from 0 to rank"),
        ({"width": 31}, "24 components and 8 codes"),
        ({"own": 1.5}, "own from 0 to 1"),
        ({"code": -1.0}, "code >= 0"),
    ],
)
def test_what_cannot_be_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        Suite(**wrong)
