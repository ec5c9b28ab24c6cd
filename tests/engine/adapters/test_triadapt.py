"""Triangular growth: exact cases of the method's specification."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from anabranch.adapters.attach import attach, merge
from anabranch.adapters.triadapt import MODELS, Growth, TriAdapt, TriAdaptSettings


def settings(**changes):
    return TriAdaptSettings(**{"steps": 100, "reference": 4, "interval": 1, **changes})


def layer(seed=0, **changes):
    random = torch.Generator().manual_seed(seed)
    return TriAdapt(12, 10, settings(**changes), dtype=torch.float64, generator=random)


@torch.no_grad()
def trained(made: TriAdapt) -> TriAdapt:
    random = torch.Generator().manual_seed(1)
    alive = slice(0, made.rank)
    for weight in (made.a[alive], made.b[alive], made.lower[alive, alive], made.upper[alive, alive]):
        weight.copy_(torch.randn(weight.shape, generator=random, dtype=weight.dtype))
    return made


def inputs(n=5):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_delta_is_assembled_from_blocks():
    made = layer(initial=2, capacity=9)
    made.grow(3)
    made.grow(1)
    trained(made)
    C = torch.zeros(6, 6, dtype=torch.float64)
    bounds = [0, 2, 5, 6]
    for low, high in pairwise(bounds):
        C[low:high, :high] += made.lower[low:high, :high].detach()  # a row block of Lo
        C[:high, low:high] += made.upper[:high, low:high].detach()  # a column block of Up
    wanted = made.scale * made.b[:6].T @ C @ made.a[:6]
    assert (made.delta() - wanted).abs().max() < 1e-12
    assert_close(made(inputs()), inputs() @ wanted.T, rtol=1e-12, atol=1e-12)


def test_nothing_outside_the_triangles_gets_gradient():
    made = trained(layer(initial=2, capacity=8))
    made.grow(2)
    trained(made)
    made(inputs()).square().sum().backward()
    below = torch.zeros(8, 8, dtype=torch.bool)
    below[:2, :2] = below[2:4, :4] = True
    assert torch.equal(made.lower.grad != 0, below)
    assert torch.equal(made.upper.grad != 0, below.T)
    assert not made.a.grad[4:].any()
    assert not made.b.grad[4:].any()


@pytest.mark.parametrize("keep_scale", [True, False])
def test_growth_keeps_the_output_up_to_the_scale(keep_scale):
    made = trained(layer(initial=2, capacity=8, keep_scale=keep_scale))
    before = made(inputs()).detach()
    made.grow(2)
    after = made(inputs()).detach()
    if keep_scale:
        assert torch.equal(after, before)
    else:
        assert_close(after, before * 2 / 4, rtol=1e-14, atol=1e-14)


def test_optimiser_moments_of_old_entries_do_not_change_at_growth():
    made = trained(layer(initial=2, capacity=8))
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    made(inputs()).square().sum().backward()
    optimiser.step()
    before = {name: optimiser.state[p]["exp_avg"].clone() for name, p in made.named_parameters()}
    made.grow(2)
    for name, parameter in made.named_parameters():
        assert torch.equal(optimiser.state[parameter]["exp_avg"], before[name])


def test_old_ranks_go_on_as_if_nothing_had_grown():
    """New ranks add nothing at first and AdamW looks at each number alone: the next step moves old ones alike."""
    moved = []
    for grows in (False, True):
        made = trained(layer(initial=2, capacity=8))
        optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
        for step in range(2):
            made(inputs()).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            if grows and step == 0:
                made.grow(3)
        moved.append([p.detach()[:2].clone() for p in (made.a, made.b)] + [made.centre().detach()[:2, :2]])
    assert_close(moved[1], moved[0], rtol=1e-13, atol=1e-15)


def test_something_can_be_learnt_from_the_start():
    """With A, B and C all zero, as published, every gradient would be zero."""
    made = layer(initial=3)
    made(inputs()).sum().backward()
    assert made.b.grad[:3].abs().min() > 0


def test_one_step_with_the_identity_is_plain_lora():
    made = layer(initial=4, alpha=8.0)
    with torch.no_grad():
        made.b[:4].normal_(generator=torch.Generator().manual_seed(3))
    assert_close(made(inputs()), 8 / 4 * inputs() @ made.a[:4].T @ made.b[:4])


def test_importance_by_hand():
    made = layer(initial=2, capacity=8)
    with torch.no_grad():
        made.upper[:2, :2] = torch.tensor([[3.0, 0.0], [4.0, 0.0]])  # beside the identity in `lower`
    assert made.importance() == 5 / 2
    by_blocks = layer(initial=2, capacity=8, norm="blocks")
    with torch.no_grad():
        by_blocks.upper[:2, :2] = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert by_blocks.importance() == 5


@pytest.mark.parametrize(
    ("model", "step", "wanted"),
    [
        ("linear", 0, 1),
        ("linear", 50, 6),
        ("linear", 100, 12),
        ("power", 0, 1),
        ("power", 100, 12),
        ("constant", 50, 3),
    ],
)
def test_how_many_may_grow(model, step, wanted):
    layers = {str(i): layer(i, model=model, most=3, reference=2) for i in range(12)}
    growth = Growth(layers["0"].settings, layers)
    assert growth.budget - growth.total == 12
    assert growth.wanted(step) == wanted


def test_equal_scores_go_to_earlier_layers_and_the_budget_holds():
    layers = {str(i): layer(i, model="constant", most=2, step=3, reference=2, capacity=8) for i in range(5)}
    growth = Growth(layers["0"].settings, layers)
    assert growth.look(1) == ["0", "1"]
    assert [made.rank for made in layers.values()] == [4, 3, 1, 1, 1]  # the second is cut: 10 ranks in all
    assert growth.total == growth.budget
    assert growth.look(2) == []


def test_the_layer_that_changed_grows_and_only_when_it_is_time():
    layers = {str(i): layer(i, model="constant", warmup=4, interval=5, capacity=16) for i in range(3)}
    growth = Growth(layers["0"].settings, layers)
    with torch.no_grad():
        layers["2"].upper[0, 0] += 1.0
    assert [growth.look(step) for step in (1, 4, 5, 8)] == [[], [], [], []]
    assert growth.look(9) == ["2"]


@pytest.mark.parametrize("model", MODELS)
def test_of_equal_layers_exactly_as_many_grow_as_wanted(model):
    layers = {str(i): layer(0, model=model, most=3, step=1, interval=10, steps=100) for i in range(6)}
    growth = Growth(layers["0"].settings, layers)
    for step in range(10, 50, 10):
        wanted, before = growth.wanted(step), [made.rank for made in layers.values()]
        assert growth.look(step) == [str(i) for i in range(wanted)]
        assert [made.rank for made in layers.values()] == [r + (i < wanted) for i, r in enumerate(before)]


@given(
    model=st.sampled_from(MODELS), reference=st.integers(1, 6), gained=st.integers(1, 9), layers=st.integers(1, 5),
    capacity=st.integers(0, 12), most=st.integers(1, 5), warmup=st.integers(0, 5), interval=st.integers(1, 4),
    norm=st.sampled_from(("rank", "blocks")), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_budget_is_never_exceeded(model, reference, gained, layers, capacity, most, warmup, interval, norm, seed):
    made = TriAdaptSettings(
        reference=reference, step=gained, capacity=reference + capacity, model=model, most=most, warmup=warmup,
        interval=interval, norm=norm, steps=30,
    )  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    adapters = {str(i): TriAdapt(3, 2, made, generator=random) for i in range(layers)}
    growth = Growth(made, adapters)
    for step in range(1, 30):
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.upper[: adapter.rank, : adapter.rank] += torch.rand(adapter.rank, adapter.rank)
        before = growth.total
        grown = growth.look(step)
        assert before <= growth.total <= growth.budget
        assert bool(grown) == (growth.total > before)
        assert all(adapter.rank <= made.most_ranks for adapter in adapters.values())
        assert growth.total - before <= growth.wanted(step) * gained or model != "constant"


def test_merged_and_taken_away_again_the_weight_is_as_it_was():
    """In float32: one rounding when the branch is added and one when it is taken away, each half an ulp of the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    before, x = model[0].weight.detach().clone(), torch.randn(5, 12)
    adapted = attach(model, lambda name, i, o: TriAdapt(i, o, settings(initial=3)), targets=["0"])
    made = adapted["0"]
    made.grow(2)
    with torch.no_grad():
        for weight in (made.b, made.lower, made.upper):
            weight[:5, :5].normal_()
    with_branch, delta = model(x), made.delta()
    merge(model)
    assert_close(model(x), with_branch, rtol=1e-5, atol=1e-5)
    largest = torch.maximum(before.abs(), model[0].weight.detach().abs())
    assert ((model[0].weight.detach() - delta - before).abs() <= largest * torch.finfo(torch.float32).eps).all()


def test_the_penalty_is_the_formula_over_living_ranks():
    layers = {"one": trained(layer(initial=2)), "two": trained(layer(initial=4))}
    assert Growth(settings(), layers).penalty() is None
    with torch.no_grad():
        layers["one"].a[2:] = 7.0  # not alive
    growth = Growth(settings(orthogonality=0.3), layers)
    wanted = 0.0
    for made in layers.values():
        A, B, I = made.a[: made.rank], made.b[: made.rank].T, torch.eye(made.rank, dtype=torch.float64)
        wanted += (A @ A.T - I).square().sum().sqrt() + (B.T @ B - I).square().sum().sqrt()
    penalty = growth.penalty()
    assert_close(penalty, 0.3 / (2 * 2) * wanted, rtol=1e-13, atol=0)
    penalty.backward()
    assert not layers["one"].a.grad[2:].any()
    assert layers["one"].lower.grad is None


def test_the_penalty_pulls_rows_apart_and_rests_where_they_are_orthonormal():
    made = trained(layer(initial=3))
    growth = Growth(settings(orthogonality=1.0), {"one": made})
    optimiser = torch.optim.SGD([made.a, made.b], lr=0.02)
    for _ in range(400):
        optimiser.zero_grad()
        growth.penalty().backward()
        optimiser.step()
    assert growth.penalty() < 0.1
    with torch.no_grad():
        made.a[:3], made.b[:3] = torch.eye(3, 12), torch.eye(3, 10)
    optimiser.zero_grad()
    growth.penalty().backward()
    assert torch.equal(made.a.grad, torch.zeros_like(made.a))  # and not NaN: a norm has no slope at zero


def test_a_pattern_of_ranks_is_saved_and_loaded():
    made = trained(layer(initial=2, capacity=8))
    made.grow(3)
    again = layer(initial=1, capacity=8)
    again.load_state_dict(made.state_dict())
    assert again.rank == 5
    assert torch.equal(again(inputs()), made(inputs()))


def test_gradients_are_right():
    made = trained(layer(initial=2, capacity=4))
    x = inputs(3).requires_grad_()
    names = ["a", "b", "lower", "upper"]
    values = [dict(made.named_parameters())[name].detach().requires_grad_() for name in names]

    def branch(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(branch, (x, *values))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot grow by 9"):
        layer(capacity=8).grow(9)
    with pytest.raises(ValueError, match="1 <= initial <= reference <= capacity"):
        settings(initial=5)
    with pytest.raises(ValueError, match="orthogonality must not be negative, got -1"):
        settings(orthogonality=-1.0)
    with pytest.raises(ValueError, match="model must be one of"):
        settings(model="cubic")
