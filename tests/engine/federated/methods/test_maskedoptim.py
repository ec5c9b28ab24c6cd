"""The mask, what noisy clients send, the median, and that each part can be left out."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated import local
from anabranch.federated.local import train
from anabranch.federated.method import Replies
from anabranch.federated.methods.fedelc import FedELC
from anabranch.federated.methods.maskedoptim import MaskedOptim
from anabranch.federated.packed import epoch
from anabranch.federated.rounds import _visits, run_round
from anabranch.federated.two_stages import TwoStages
from anabranch_kernels.geometric_median.op import geometric_median

NOISY, NOBODY = torch.tensor([False, True, True, False]), torch.zeros(4, dtype=torch.bool)


def after(federation, rounds=2, noisy=NOISY):
    federation.server["noisy"] = noisy
    for _ in range(rounds):
        run_round(federation)
    return federation


def only_visit(federation, noisy=NOISY):
    federation.server["noisy"] = noisy
    (visit,) = _visits(federation, torch.arange(4))
    return visit


def of_replies(method, models, counts=None):
    """What the server makes of models [m, D] around 7, in tensors of 3, 1 and D - 4 numbers."""
    m, D = models.shape
    counts = torch.ones(m, dtype=torch.int64) if counts is None else counts
    nobody, sizes = torch.zeros(m, dtype=torch.bool), torch.tensor([3, 1, D - 4])
    server = {"model": torch.full((1, D), 7.0), "noisy": nobody, "sizes": sizes}
    mean = (counts / counts.sum()) @ models
    replies = Replies(torch.arange(m), counts, models[:, None], mean[None], torch.zeros(m, 1), {})
    return method.aggregate(server, replies, 0)["model"][0]


def test_without_its_differences_it_is_fedelc_to_the_bit(found_small):
    bare = MaskedOptim(warmup=9, beta=0.2, held_share=1.0, received=0.0, aggregation="distance-aware")
    ours, theirs = after(found_small(bare)), after(found_small(FedELC(warmup=9)))
    assert torch.equal(ours.server["model"], theirs.server["model"])
    assert all(torch.equal(ours.kept[k]["labels"], theirs.kept[k]["labels"]) for k in range(4))


@pytest.mark.parametrize("part", [{"held_share": 0.8}, {"beta": 0.1}, {"received": 0.2}])
def test_each_difference_is_one(found_small, part):
    bare = {"warmup": 9, "beta": 0.2, "held_share": 1.0, "received": 0.0, "aggregation": "distance-aware"}
    ours, theirs = after(found_small(MaskedOptim(**{**bare, **part}))), after(found_small(FedELC(warmup=9)))
    assert float((ours.server["model"] - theirs.server["model"]).abs().max()) > 1e-5


def test_the_mask_is_of_each_clients_own_batch(found_small):
    visit = only_visit(found_small(MaskedOptim(warmup=9)))
    for batch in epoch(visit.data, visit.streams, 0, size=4, drop_last=False):
        logits = visit.see(visit.received, batch.x).logits
        held = MaskedOptim().held(logits, batch)
        assert not (held & ~batch.real).any()
        for k in range(4):
            size = int(batch.real[k].sum())
            losses = F.cross_entropy(logits[k], batch.y[k], reduction="none")[batch.real[k]]
            assert int(held[k].sum()) == int(0.8 * size)
            expected = losses.argsort(stable=True)[: int(0.8 * size)]
            assert held[k][batch.real[k]].nonzero().flatten().tolist() == sorted(expected.tolist())


def test_noisy_clients_send_a_fifth_of_what_they_received(found_small):
    options = {"warmup": 9, "merge": False}
    whole = only_visit(found_small(MaskedOptim(received=0.0, **options)))
    mixed = only_visit(found_small(MaskedOptim(**options)))
    own, sent = train(MaskedOptim(received=0.0, **options), whole), train(MaskedOptim(**options), mixed)
    assert torch.equal(sent[~NOISY], own[~NOISY])
    torch.testing.assert_close(sent[NOISY], (0.2 * whole.received + 0.8 * own)[NOISY])
    all_of_it = only_visit(found_small(MaskedOptim(received=1.0, **options)))
    assert torch.equal(train(MaskedOptim(received=1.0, **options), all_of_it)[NOISY], whole.received[NOISY])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_median_is_where_all_pulls_cancel(weighted, per_tensor):
    models = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) + 7
    counts = torch.tensor([1, 2, 3, 4, 5, 6])
    found = of_replies(MaskedOptim(weighted=weighted, per_tensor=per_tensor), models, counts).double()
    w = counts.double() if weighted else torch.ones(6, dtype=torch.float64)
    sizes = [3, 1, 5] if per_tensor else [9]
    for points, z in zip(models.double().split(sizes, 1), found.split(sizes), strict=True):
        away = z - points
        lengths = away.norm(dim=1)
        pull = ((w / lengths.clamp_min(1e-12))[:, None] * away).sum(0).norm()
        at_it = w[lengths < 1e-12].sum()  # a median that is a given point withstands as much as that one weighs
        assert float(pull) < float(at_it) + 1e-4 * float(w.sum())


def test_a_majority_at_one_place_is_the_median():
    models = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    models[:4] = models[0].clone()
    models[4:] *= 1e4
    assert torch.equal(of_replies(MaskedOptim(), models), models[0])
    assert torch.equal(of_replies(MaskedOptim(per_tensor=True), models), models[0])
    assert float((of_replies(MaskedOptim(aggregation="mean"), models) - models[0]).norm()) > 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Median(TwoStages):
    """FedAvg with adjusted logits and a geometric median: the first stage for ever."""

    def aggregate(self, server, replies, round):
        return {**server, "model": geometric_median(replies.models[:, 0][None], centre=server["model"]).point}


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_with_nobody_noisy_or_without_learning_it_is_a_median_to_the_bit(found_small, tau):
    plain = after(found_small(Median(warmup=9, tau=tau)), 3).server["model"]
    nobody = after(found_small(MaskedOptim(warmup=9, tau=tau)), 3, NOBODY).server["model"]
    unlearned = after(found_small(MaskedOptim(warmup=9, tau=tau, learn=False)), 3).server["model"]
    assert torch.equal(nobody, plain)
    assert torch.equal(unlearned, plain)


def test_with_all_parts_left_out_it_is_fedavg_to_the_bit(found_small, trained, by_steps):
    bare = MaskedOptim(warmup=9, tau=0.0, learn=False, aggregation="mean")
    assert torch.equal(after(found_small(bare), 3).server["model"], trained(by_steps, 3))


@pytest.mark.parametrize("drop_last", [False, True])
def test_alone_and_together(found_small, monkeypatch, drop_last):
    def learned(numbers):
        monkeypatch.setattr(local, "CACHED_NUMBERS", numbers)
        return after(found_small(MaskedOptim(warmup=9), drop_last=drop_last), 3)

    alone, together = learned(1), learned(10**6)
    torch.testing.assert_close(alone.server["model"], together.server["model"], atol=1e-5, rtol=1e-5)
    for k in range(4):
        torch.testing.assert_close(alone.kept[k]["labels"], together.kept[k]["labels"], atol=1e-3, rtol=1e-4)


def test_settings_are_checked():
    for wrong, match in (
        ({"held_share": 1.1}, "held_share"), ({"received": -0.1}, "received"), ({"aggregation": "sum"}, "aggregation"),
        ({"certainty": -1.0}, "certainty"), ({"warmup": 0}, "warmup"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            MaskedOptim(**wrong)
