"""Co-teaching beside two runs of FedAvg, a loop over samples, and clients on their own."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.packed import Batch
from anabranch.federated.rounds import run_round


@pytest.mark.parametrize("drop_last", [False, True])
def test_without_forgetting_it_is_two_runs_of_fedavg_to_the_bit(found_small, drop_last, by_steps):
    both = found_small(CoTeaching(forget=0), drop_last=drop_last)
    apart = [found_small(by_steps, drop_last=drop_last) for _ in range(2)]
    for w, federation in enumerate(apart):
        federation.server["model"] = both.server["model"][w : w + 1].clone()
    assert not torch.equal(apart[0].server["model"], apart[1].server["model"])
    for _ in range(3):
        for federation in (both, *apart):
            run_round(federation)
    assert torch.equal(both.server["model"], torch.cat([federation.server["model"] for federation in apart]))


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(CoTeaching(forget=0.4, ramp=2), rounds=4)


def test_each_network_learns_what_the_other_chose():
    class Seen:
        """A visit whose networks say what is written here."""

        def __init__(self, logits, round):
            self.logits, self.round = logits, round

        def see(self, rows, x):
            return self

    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 7, 3, generator=generator)
    y = torch.randint(3, (2, 7), generator=generator)
    sizes = (7, 4)
    weight = torch.stack([(torch.arange(7) < size) / size for size in sizes])
    batch = Batch(torch.zeros(2, 7, 1), y, torch.arange(7).expand(2, 7), weight, torch.tensor([True, True]), 0)
    loss = CoTeaching(forget=0.5, ramp=2).loss(Seen(logits, round=1), torch.zeros(4, 1), batch)
    for i, size in enumerate(sizes):
        own = [F.cross_entropy(logits[w * 2 + i, :size], y[i, :size], reduction="none").tolist() for w in range(2)]
        for w in range(2):
            chosen = sorted(range(size), key=lambda b: own[1 - w][b])[: size - size // 4]  # f(1) = 0.5 / 2
            expected = sum(own[w][b] for b in chosen) / len(chosen)
            assert float(loss[w * 2 + i]) == pytest.approx(expected, rel=1e-5)


def test_settings_are_checked():
    for wrong in ({"forget": 1.0}, {"forget": -0.1}, {"ramp": -1}):
        with pytest.raises(ValueError, match="forget"):
            CoTeaching(**wrong)
