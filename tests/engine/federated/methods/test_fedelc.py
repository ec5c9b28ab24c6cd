"""FedELC beside autograd, what becomes of the labels, and FedAvg where nothing is corrected."""

import pytest
import torch

from anabranch.federated import local
from anabranch.federated.local import train
from anabranch.federated.methods.fedelc import FedELC
from anabranch.federated.networks.layout import forward
from anabranch.federated.packed import epoch
from anabranch.federated.rounds import Holdings, _visits, run_round

NOISY = torch.tensor([False, True, True, False])


def after(federation, rounds=2, noisy=NOISY):
    federation.server["noisy"] = noisy
    for _ in range(rounds):
        run_round(federation)
    return federation


def only_visit(federation, noisy=NOISY):
    federation.server["noisy"] = noisy
    (visit,) = _visits(federation, torch.arange(4))
    return visit


def plainly(z, t, y, alpha, beta, held):
    """The loss of a batch [B, C] of one client as the equation reads; held [B] bool."""
    C, r, s = z.shape[-1], z.softmax(-1), t.softmax(-1)
    divergence, entropy = (r * (r.log() - s.log())).sum(-1).mean(), -(r * r.log()).sum(-1).mean()
    compatible = -(held * s[torch.arange(len(y)), y].log()).sum() / len(y)
    return divergence / C + alpha * compatible + beta * entropy / C


def test_slopes_and_steps_of_labels_are_autograds(found_small):
    method = FedELC(warmup=9, label_step=3.0)
    f = found_small(method)
    visit = only_visit(f)
    generator = torch.Generator().manual_seed(3)
    visit.kept["labels"] += torch.randn(visit.kept["labels"].shape, generator=generator)
    rows = visit.received + 0.1 * torch.randn(visit.received.shape, generator=generator)
    for batch in epoch(visit.data, visit.streams, 0, size=4, drop_last=False):
        before = visit.kept["labels"].clone()
        leaf = rows.clone().requires_grad_()
        loss = method.loss(visit, leaf, batch)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        stepped = before.clone()
        for k in (NOISY & batch.live).nonzero().flatten().tolist():
            real, which = batch.real[k], batch.which[k][batch.real[k]]
            row, t = rows[k : k + 1].clone().requires_grad_(), before[k, which].clone().requires_grad_()
            z = forward(f.network, row, batch.x[k][real][None], training=True).logits[0]
            expected = plainly(z, t, batch.y[k][real], method.alpha, method.beta, torch.ones(len(t)))
            of_row, of_labels = torch.autograd.grad(expected, (row, t))
            assert float(of_labels.sum(-1).abs().max()) < 1e-6  # a softmax does not see what all logits share
            torch.testing.assert_close(loss[k], expected.detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(slope[k], of_row[0], atol=1e-6, rtol=1e-5)
            stepped[k, which] -= 3.0 * len(which) * of_labels  # lambda = label_step times the batch's size
        torch.testing.assert_close(visit.kept["labels"], stepped, atol=1e-5, rtol=1e-5)


def test_labels_of_clean_clients_and_sums_of_labels_stay(found_small):
    f = after(found_small(FedELC(warmup=9, merge=False)))
    for k, mine in enumerate(f.holdings.owned):
        labels, y = f.kept[k]["labels"], f.holdings.y[mine]
        torch.testing.assert_close(labels.sum(1), torch.full((len(y),), 10.0), atol=1e-3, rtol=0)
        first = 10.0 * torch.nn.functional.one_hot(y, 3)
        assert torch.equal(labels, first) != bool(NOISY[k])


def test_without_steps_and_merges_labels_never_change(found_small):
    f = after(found_small(FedELC(warmup=9, label_step=0.0, merge=False)), 3)
    for k, mine in enumerate(f.holdings.owned):
        assert torch.equal(f.kept[k]["labels"], 10.0 * torch.nn.functional.one_hot(f.holdings.y[mine], 3))


def test_labels_are_merged_with_what_the_trained_network_says(found_small):
    f = found_small(FedELC(warmup=9, label_step=0.0))
    visit = only_visit(f)
    first = visit.kept["labels"].clone()
    rows = train(f.method, visit)
    says = forward(f.network, rows, visit.data.x).logits.softmax(-1)
    expected = torch.where(NOISY[:, None, None], 5 * (first.softmax(-1) + says), first)
    torch.testing.assert_close(visit.kept["labels"], expected)


def test_samples_that_are_left_out_keep_their_labels(found_small):
    f = found_small(FedELC(warmup=9, merge=False), epochs=1, drop_last=True, batch=8)
    visit = only_visit(f)  # client 2 has 19 samples
    first = visit.kept["labels"].clone()
    seen = {int(i) for batch in epoch(visit.data, visit.streams, 0, size=8, drop_last=True) for i in batch.which[2]}
    train(f.method, visit)
    moved = (visit.kept["labels"][2] != first[2]).any(-1).nonzero().flatten().tolist()
    assert len(moved) == 16
    assert set(moved) <= seen


def test_labels_follow_their_samples(found_small):
    f, g = (found_small(FedELC(warmup=9), batch=32) for _ in range(2))  # the order of a batch says nothing
    order = torch.randperm(19, generator=torch.Generator().manual_seed(5))
    owned = list(f.holdings.owned)
    owned[2] = owned[2][order]
    g.holdings = Holdings(f.holdings.x, f.holdings.y, owned)
    after(f)
    after(g)
    torch.testing.assert_close(g.kept[2]["labels"], f.kept[2]["labels"][order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(g.server["model"], f.server["model"], atol=1e-5, rtol=1e-5)


def test_with_nobody_noisy_and_no_adjustment_it_is_fedavg_to_the_bit(found_small, trained, by_steps):
    nobody = torch.zeros(4, dtype=torch.bool)
    f = after(found_small(FedELC(tau=0.0, warmup=9)), 3, nobody)
    assert torch.equal(f.server["model"], trained(by_steps, 3))


@pytest.mark.parametrize("drop_last", [False, True])
def test_alone_and_together(found_small, monkeypatch, drop_last):
    def learned(numbers):
        monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
        return after(found_small(FedELC(warmup=9), drop_last=drop_last), 3)

    alone, together = learned(1), learned(10**6)
    torch.testing.assert_close(alone.server["model"], together.server["model"], atol=1e-5, rtol=1e-5)
    for k in range(4):  # steps of 15.6 make roundings of the loss's slope as many times larger
        torch.testing.assert_close(alone.kept[k]["labels"], together.kept[k]["labels"], atol=1e-3, rtol=1e-4)


def test_settings_are_checked():
    for wrong in ({"alpha": -0.1}, {"beta": -0.1}, {"certainty": 0.0}, {"label_step": -1.0}):
        with pytest.raises(ValueError, match="alpha, beta, label_step >= 0 and certainty > 0"):
            FedELC(**wrong)
