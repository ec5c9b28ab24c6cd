"""FedNoRo's loss as its equations read, client by client, and FedAvg where nothing is corrected."""

import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated import local
from anabranch.federated.methods.fednoro import FedNoRo
from anabranch.federated.networks.layout import forward
from anabranch.federated.packed import epoch
from anabranch.federated.rounds import _visits, run_round

NOISY = torch.tensor([False, True, True, False])


def after(federation, rounds, noisy=NOISY, first=0):
    federation.server["noisy"], federation.round = noisy, first
    for _ in range(rounds):
        run_round(federation)
    return federation.server["model"]


def test_the_ramp():
    method = FedNoRo()
    assert method.listening(20, 120) == pytest.approx(0.8 * math.exp(-5))
    assert method.listening(70, 120) == pytest.approx(0.8 * math.exp(-1.25))
    assert method.listening(120, 120) == pytest.approx(0.8)
    assert method.listening(20, 20) == method.listening(20, 21)


def test_the_loss(found_small):
    method = FedNoRo(warmup=2, tau=0.7)
    f = found_small(method)
    f.server["noisy"], f.round = NOISY, 5
    (visit,) = _visits(f, torch.arange(4))
    rows = visit.received + 0.1 * torch.randn(visit.received.shape, generator=torch.Generator().manual_seed(3))
    w = method.listening(5, f.schedule.rounds)
    for batch in epoch(visit.data, visit.streams, 0, size=4, drop_last=False):
        found = method.loss(visit, rows, batch)
        for k in batch.live.nonzero().flatten().tolist():
            y_all, real = f.holdings.y[f.holdings.owned[k]], batch.real[k]
            x, y = batch.x[k][real][None], batch.y[k][real]
            shares = torch.bincount(y_all, minlength=3) / len(y_all)
            z = forward(f.network, rows[k : k + 1], x).logits[0] + 0.7 * shares.clamp_min(1e-8).log()
            teacher = (forward(f.network, f.server["model"], x).logits[0] / 0.8).softmax(-1)
            expected = F.cross_entropy(z, y)
            if NOISY[k]:
                divergence = (teacher * (teacher.log() - z.log_softmax(-1))).sum(-1).mean()
                expected = (1 - w) * expected + w * divergence
            torch.testing.assert_close(found[k], expected, atol=1e-5, rtol=1e-5)


def test_with_nobody_noisy_and_no_adjustment_it_is_fedavg_to_the_bit(found_small, trained, by_steps):
    nobody = torch.zeros(4, dtype=torch.bool)
    assert torch.equal(after(found_small(FedNoRo(tau=0.0, warmup=9)), 3, nobody), trained(by_steps, 3))


def test_each_part_of_the_second_stage_matters(found_small):
    def model(noisy, **options):
        return after(found_small(FedNoRo(warmup=2, **options)), 2, noisy, first=7)

    plain, deaf, whole = model(torch.zeros(4, dtype=torch.bool)), model(NOISY, received=0.0), model(NOISY)
    assert float((deaf - plain).abs().max()) > 1e-4  # they count less
    assert float((whole - deaf).abs().max()) > 1e-4  # and listen to the received model
    assert float((model(NOISY, temperature=2.0) - whole).abs().max()) > 1e-4


@pytest.mark.parametrize("drop_last", [False, True])
def test_alone_and_together(found_small, monkeypatch, drop_last):
    def model(numbers):
        monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
        return after(found_small(FedNoRo(warmup=2), drop_last=drop_last), 3, first=7)

    torch.testing.assert_close(model(1), model(10**6), atol=1e-5, rtol=1e-5)


def test_settings_are_checked():
    for wrong in ({"temperature": 0.0}, {"received": 1.5}):
        with pytest.raises(ValueError, match="temperature > 0 and received"):
            FedNoRo(**wrong)
    with pytest.raises(ValueError, match="warmup"):
        FedNoRo(warmup=0)
