"""The penalty on correlated features beside the plain formula, and as an option of any method's training."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.federated import local
from anabranch.federated.decorrelation import correlation
from anabranch.federated.method import FedAvg, batch_mean, cross_entropy
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plainly(h):
    """R of one batch [B, d] as it is written, off the diagonal of M."""
    z = (h - h.mean(0)) / torch.sqrt(h.var(0) + 1e-8)
    M = z.T @ z
    return M[~torch.eye(len(M), dtype=torch.bool)].square().mean() / len(h)


@settings(max_examples=30, deadline=None)
@given(B=st.integers(2, 9), d=st.integers(2, 12), seed=st.integers(0, 99))
def test_either_form_is_the_formula_and_so_is_its_slope(B, d, seed):
    """d > B takes the fast form, d <= B the slow one."""
    h, again = (features(1, B, d, seed=seed).requires_grad_() for _ in range(2))
    fast, slow = correlation(h, torch.ones(1, B, dtype=torch.bool))[0], plainly(again[0])
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, h), torch.autograd.grad(slow, again))


def test_features_that_go_apart_cost_nothing():
    h = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    for copies in (1, 4):  # d = 3 < B = 4, and B < d = 3 with samples that do not count
        rows = h.repeat(copies, 1)[None]
        assert correlation(rows, torch.ones(1, len(rows[0]), dtype=torch.bool)).abs() < 1e-12


@pytest.mark.parametrize(("B", "d"), [(5, 3), (5, 8)])
def test_features_that_all_go_together_cost_most(B, d):
    h = features(1, B, 1) * torch.linspace(-2, 3, d, dtype=torch.float64)
    expected = torch.tensor([(B - 1) ** 2 / B], dtype=torch.float64)
    torch.testing.assert_close(correlation(h, torch.ones(1, B, dtype=torch.bool)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [3, 9])
def test_samples_that_do_not_count_are_as_if_they_were_not_there(d):
    h, counts = features(6, 5, d), torch.tensor([5, 3, 2])  # three clients, two networks each
    real = torch.arange(5) < counts[:, None]
    together = correlation(h, real)
    for i, one in enumerate(h):
        n = int(counts[i % 3])
        torch.testing.assert_close(together[i], plainly(one[:n]))


def test_one_sample_or_one_feature_has_no_correlation():
    assert correlation(features(1, 4, 6), torch.tensor([[True, False, False, False]])) == 0
    assert correlation(features(1, 4, 1), torch.ones(1, 4, dtype=torch.bool)) < 1e-12
    h = torch.zeros(1, 4, 3).requires_grad_()  # features that are dead
    R = correlation(h, torch.ones(1, 4, dtype=torch.bool))
    assert R == 0
    assert torch.autograd.grad(R.sum(), h)[0].isfinite().all()


NETWORK = MLP((6, 7, 3))


def holdings(counts):
    generator, M = torch.Generator().manual_seed(1), sum(counts)
    x = torch.randn(M, 6, generator=generator)
    return Holdings(x, torch.randint(0, 3, (M,), generator=generator), torch.arange(M).split(list(counts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blurred(FedAvg):
    """Never looks at the batch itself."""

    def loss(self, visit, rows, batch):
        return batch_mean(cross_entropy(visit.see(rows, batch.x * 0.5).logits, batch.y), batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plainly(FedAvg):
    """The same option written into the loss."""

    coefficient: float
    scale: float = 1.0

    def loss(self, visit, rows, batch):
        losses = batch_mean(cross_entropy(visit.see(rows, batch.x * self.scale).logits, batch.y), batch)
        h = visit.see(rows, batch.x).features
        return losses + self.coefficient * correlation(h, batch.real)


def after(method, **options):
    federation = found(method, NETWORK, holdings([12, 19, 8, 10]), Schedule(batch=8, epochs=2, lr=0.02, **options))
    for _ in range(2):
        run_round(federation)
    return federation.server["model"]


@pytest.mark.parametrize(("method", "scale"), [(FedAvg(), 1.0), (Blurred(), 0.5)])
def test_any_method_can_carry_it(method, scale):
    carried = after(method, decorrelation=0.2)
    torch.testing.assert_close(carried, after(Plainly(coefficient=0.2, scale=scale)), atol=1e-6, rtol=0)
    assert (carried - after(method)).abs().max() > 1e-3


@pytest.mark.parametrize("method", [FedAvg(), Blurred()])
def test_alone_or_together(monkeypatch, method):
    together = after(method, decorrelation=0.2)
    monkeypatch.setattr(local, "CACHED_NUMBERS", 1)
    torch.testing.assert_close(after(method, decorrelation=0.2), together, atol=1e-5, rtol=0)


def test_a_pass_of_the_method_is_not_taken_twice(monkeypatch, by_autograd):
    passes = []
    decode = MLP.decode
    monkeypatch.setattr(MLP, "decode", lambda *args, **kw: (passes.append(1), decode(*args, **kw))[1])
    after(by_autograd)
    expected = len(passes)
    after(by_autograd, decorrelation=0.2)
    assert len(passes) == 2 * expected


def test_a_pass_of_its_own_leaves_statistics_alone():
    network = ResNet(1, 4, 4, 3, wide=8, blocks=(1, 1, 1, 1), norm="batch")
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = Holdings(x, torch.arange(8) % 3, [torch.arange(8)])

    def statistics(decorrelation):
        schedule = Schedule(batch=8, epochs=1, lr=1e-12, decorrelation=decorrelation)
        federation = found(Blurred(), network, data, schedule)
        run_round(federation)
        return federation.server["model"][0, network.layout.trained :]

    assert torch.equal(statistics(0.0), statistics(0.1))


def test_it_is_not_negative():
    with pytest.raises(ValueError, match="decorrelation"):
        Schedule(decorrelation=-0.1)
