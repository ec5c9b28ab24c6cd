"""AdaLoRA: what PEFT's computes step by step, the budget's course, and the mask."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from anabranch.adapters.adalora import AdaLora, AdaLoraSettings, Pruning
from anabranch.adapters.attach import attach

NAMES = ("one", "two", "three")


def settings(**changes):
    return AdaLoraSettings(
        **{"steps": 20, "initial": 6, "target": 3, "warmup": 3, "final": 6, "interval": 2, **changes}
    )


class Model(nn.Module):
    """Three layers whose outputs are far from equally large, so that their triplets are not equally important."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, inputs, outputs in (("one", 7, 9), ("two", 9, 5), ("three", 5, 4)):
            layer = nn.Linear(inputs, outputs, bias=False)
            layer.weight.data.normal_(generator=random)
            setattr(self, name, layer.double())

    def forward(self, x):
        return self.three(self.two(self.one(x).tanh()).tanh())


def pair(made):
    """The same model with our adapters and with PEFT's, in float64, equal in every parameter."""
    config = peft.AdaLoraConfig(
        init_r=made.initial, target_r=made.target, tinit=made.warmup, tfinal=made.final, deltaT=made.interval,
        total_step=made.steps, lora_alpha=made.alpha, beta1=made.beta1, beta2=made.beta2,
        orth_reg_weight=made.orthogonality, target_modules=list(NAMES),
    )  # fmt: skip
    theirs = peft.get_peft_model(Model(), config).double()
    ours = Model()
    layers = attach(ours, lambda name, i, o: AdaLora(i, o, made, dtype=torch.float64), targets=NAMES)
    for name, layer in layers.items():
        other = theirs.base_model.model.get_submodule(name)
        layer.a.data.copy_(other.lora_A["default"].data)
        layer.b.data.copy_(other.lora_B["default"].data.T)
    return ours, layers, theirs


def batches(steps):
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 7, generator=random, dtype=torch.float64)
        yield x, torch.randn(16, 4, generator=random, dtype=torch.float64)


def test_a_whole_training_is_pefts():
    """20 steps through all phases, in float64: what differs is the order of sums, and the scale, float32 in our op."""
    made = settings(alpha=6.0, orthogonality=0.3)
    ours, layers, theirs = pair(made)
    pruning = Pruning(made, layers)
    # AdamW would enlarge rounding errors of gradients near zero.
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    history = []
    for step, (x, y) in enumerate(batches(made.steps), 1):
        loss = (ours(x) - y).square().mean()
        (loss + pruning.penalty()).backward()
        other = (theirs(x) - y).square().mean()
        (other + penalty_of_peft(theirs, made.orthogonality)).backward()
        assert_close(loss, other, rtol=1e-6, atol=0)
        for optimiser in optimisers:
            optimiser.step()
        pruning.look(step)
        theirs.base_model.update_and_allocate(step)
        for optimiser in optimisers:
            optimiser.zero_grad()
        history.append([layer.rank for layer in layers.values()])
        allocator = theirs.base_model.rankallocator
        for name, layer in layers.items():
            start = f"{name}.lora_"
            for part, letter in (("a", "A"), ("e", "E"), ("b", "B")):
                parameter = theirs.base_model.model.get_submodule(name).get_parameter(f"lora_{letter}.default")
                assert_close(layer.get_parameter(part), parameter.T if part == "b" else parameter, rtol=1e-5, atol=1e-9)
                if step < made.steps - made.final:
                    theirs_average = allocator.exp_avg_unc[f"{start}{letter}.default"]
                    assert_close(
                        layer.get_buffer(f"uncertainty_{part}"), theirs_average.T if part == "b" else theirs_average,
                        rtol=1e-5, atol=1e-12,
                    )  # fmt: skip
            if (pattern := theirs.peft_config["default"].rank_pattern) is not None:
                assert layer.alive.tolist() == pattern[f"{start}E.default"]
    assert history[2] == [6, 6, 6]
    assert sum(history[-1]) == 9
    assert any(len(set(ranks)) > 1 for ranks in history)


def penalty_of_peft(model, weight):
    """As PEFT adds it to a loss that the model itself returns."""
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return weight * sum(terms) / len(terms)


@given(
    initial=st.integers(2, 9), drop=st.integers(0, 8), layers=st.integers(1, 4), warmup=st.integers(0, 5),
    middle=st.integers(1, 9), final=st.integers(0, 5), interval=st.integers(1, 4),
)  # fmt: skip
def test_the_budget_falls_from_the_initial_to_the_target_and_is_kept(
    initial, drop, layers, warmup, middle, final, interval
):
    target = max(1, initial - drop)
    made = settings(
        initial=initial, target=target, warmup=warmup, final=final, steps=warmup + middle + final, interval=interval
    )
    adapters = {str(i): AdaLora(3, 2, made) for i in range(layers)}
    pruning = Pruning(made, adapters)
    random = torch.Generator().manual_seed(initial)
    before = pruning.total
    for step in range(1, made.steps + 1):
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.data.normal_(generator=random)
                parameter.grad = torch.randn(parameter.shape, generator=random)
        pruning.look(step)
        assert pruning.total <= before
        before = pruning.total
        for adapter in adapters.values():
            if step >= made.steps - final:
                assert not adapter.e[~adapter.alive].any()
    assert pruning.total == target * layers


def test_of_equal_scores_the_earlier_stay():
    made = settings()
    layers = {name: AdaLora(4, 4, made) for name in NAMES}
    pruning = Pruning(made, layers)
    assert pruning.keep(8) == ["two", "three"]
    assert [layer.rank for layer in layers.values()] == [6, 2, 0]


def test_what_is_masked_adds_nothing_and_delta_is_the_branch():
    made = settings(alpha=3.0)
    layer = AdaLora(5, 4, made, dtype=torch.float64)
    layer.e.data.normal_()
    layer.alive[::2] = False
    layer.mask()
    x = torch.randn(6, 5, dtype=torch.float64)
    kept = layer.alive.nonzero()[:, 0]
    wanted = 3.0 / (6 + 1e-5) * (x @ layer.a[kept].T * layer.e[kept].T) @ layer.b[kept]
    assert_close(layer(x), wanted, rtol=1e-6, atol=0)  # the op's scale is float32
    assert_close(x @ layer.delta().T, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 7}, "1 <= target <= initial, got 7 and 6"),
        ({"warmup": 14}, r"warmup \+ final < steps"),
        ({"beta1": 1.0}, "betas between 0 and 1"),
        ({"orthogonality": -1.0}, "orthogonality of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
