"""FedLSR beside its formulas in plain probabilities, and SciPy's divergence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from anabranch.federated import augment
from anabranch.federated.method import FedAvg
from anabranch.federated.methods import fedlsr
from anabranch.federated.methods.fedlsr import FedLSR, divergence, entropy
from anabranch.federated.rounds import run_round
from anabranch.federated.streams import Purpose


@pytest.mark.parametrize("augment", [False, True])
def test_alone_and_together(same_alone_and_together, augment):
    same_alone_and_together(FedLSR(ramp=2), augment=augment)


def test_the_loss_is_the_formula(found_small):
    checked = []

    class Checked(FedLSR):
        def loss(self, visit, rows, batch):
            found = FedLSR.loss(self, visit, rows, batch)
            z = [visit.see(rows, x).logits.double()
                 for x in (batch.x, augment.augment(batch.x, visit.streams, batch.number, 1))]  # fmt: skip
            l = visit.streams.uniform(1, Purpose.MIX, batch.number).double()[..., None]
            p = l * z[0].softmax(-1) + (1 - l) * z[1].softmax(-1)
            sharp = p**2 / (p**2).sum(-1, keepdim=True)
            q, r = ((3 * one).softmax(-1).numpy(force=True) for one in z)
            hard = -sharp.gather(2, batch.y[..., None])[..., 0].log()
            apart = torch.from_numpy(jensenshannon(q, r, axis=-1) ** 2)
            unsure = torch.from_numpy(scipy_entropy(q, axis=-1) + scipy_entropy(r, axis=-1)) / 2
            gamma = 0.4 * min(1, visit.round / 2)
            expected = ((hard + gamma * apart + 0.3 * unsure) * batch.weight).sum(1)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
            checked.append(visit.round)
            return found

    federation = found_small(Checked(ramp=2))
    for _ in range(3):
        run_round(federation)
    assert set(checked) == {0, 1, 2}


def test_of_two_equal_views_it_is_cross_entropy_of_twice_the_logits(trained, monkeypatch):
    class Twice(FedAvg):
        def loss(self, visit, rows, batch):
            logits = 2 * visit.see(rows, batch.x).logits
            return (F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), reduction="none").view_as(batch.y)
                    * batch.weight).sum(1)  # fmt: skip

    monkeypatch.setattr(fedlsr, "augment", lambda x, *_: x)
    # gamma is left on: views that agree do not diverge
    torch.testing.assert_close(trained(FedLSR(entropy=0, ramp=0)), trained(Twice()), atol=1e-5, rtol=0)


def test_divergences_are_scipys_and_bounded():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 6, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    expected = jensenshannon(p.exp().numpy(), q.exp().numpy(), axis=-1) ** 2
    np.testing.assert_allclose(divergence(p, q).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(entropy(p).numpy(), scipy_entropy(p.exp().numpy(), axis=-1), rtol=1e-9)
    far = torch.tensor([[0.0, -900.0], [-900.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    assert float(divergence(far[0], far[1])) == pytest.approx(math.log(2))


def test_settings_are_checked():
    for wrong in ({"gamma": -1}, {"entropy": -1}, {"ramp": -1}, {"tau": 0}):
        with pytest.raises(ValueError, match="gamma"):
            FedLSR(**wrong)
