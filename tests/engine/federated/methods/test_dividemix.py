"""DivideMix: its warm-up, its loss by a loop over samples, and what is drawn for MixUp."""

import pytest
import torch
from scipy import stats

from anabranch.federated.augment import augment
from anabranch.federated.methods import dividemix
from anabranch.federated.methods.dividemix import DivideMix
from anabranch.federated.networks.text import Text
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams
from anabranch.labels.mixtures import clean_posteriors

SOON = {"warm_up": 1, "ramp": 2}


def test_warm_up_is_two_runs_of_fedavg_to_the_bit(found_small, by_autograd):
    both = found_small(DivideMix(warm_up=3))
    apart = [found_small(by_autograd) for _ in range(2)]
    for w, federation in enumerate(apart):
        federation.server["model"] = both.server["model"][w : w + 1].clone()
    for _ in range(3):
        for federation in (both, *apart):
            run_round(federation)
    assert torch.equal(both.server["model"], torch.cat([federation.server["model"] for federation in apart]))


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(DivideMix(**SOON), rounds=3)


def test_the_loss_is_the_formula(found_small):
    parts = set()

    class Checked(DivideMix):
        def _mix(self, visit, batch, real):
            self.__class__.drawn = DivideMix._mix(self, visit, batch, real)
            return self.drawn

        def loss(self, visit, rows, batch):
            result = DivideMix.loss(self, visit, rows, batch)
            if visit.round < 1:
                return result
            views = [augment(batch.x, visit.streams, batch.number, view) for view in (1, 2)]
            says = lambda x: visit.see(rows.detach(), x, training=False).logits.softmax(-1).double()
            guess = sum(map(says, views)) / 2
            N, C = len(batch.y), 3
            share, partner = (drawn.tolist() for drawn in self.drawn)
            for row in range(2 * N):
                w, i = divmod(row, N)
                size = int(batch.real[i].sum())
                clean = [float(visit.notes["clean"][row, batch.which[i, b]]) for b in range(size)]
                targets = []
                for b in range(size):
                    own, peer = guess[row, b], guess[(1 - w) * N + i, b]
                    one_hot = torch.eye(C, dtype=torch.float64)[batch.y[i, b]]
                    kept = clean[b] * one_hot + (1 - clean[b]) * own if clean[b] > 0.5 else (own + peer) / 2
                    targets += [kept**2 / (kept**2).sum()] * 2  # of both views
                inputs = [views[v][i, b] for b in range(size) for v in range(2)]
                sums, counts, shown, m = [0.0, 0.0], [0, 0], torch.zeros(C).double(), share[row][0]
                for place in range(2 * size):
                    assert partner[row][place] < 2 * size  # never what only fills up
                    mix = lambda values, m=m, row=row, place=place: (
                        m * values[place] + (1 - m) * values[partner[row][place]]
                    )
                    p = says(mix(inputs).expand(N, 1, -1))[row, 0]
                    labelled = clean[place // 2] > 0.5
                    t = mix(targets)
                    sums[labelled] += float(-(t * p.log()).sum() if labelled else (p - t).square().mean())
                    counts[labelled] += 1
                    shown += p / (2 * size)
                parts.update((visit.round, labelled) for labelled in (0, 1) if counts[labelled])
                expected = sums[1] / max(counts[1], 1) + float((1 / (C * shown)).log().mean())
                expected += 25 * {1: 0, 2: 0.5, 3: 1}[visit.round] * sums[0] / max(counts[0], 1)
                if size:
                    assert float(result[row].detach()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
            return result

    federation = found_small(Checked(**SOON), epochs=1)
    for _ in range(4):
        run_round(federation)
    assert parts == {(round, labelled) for round in (1, 2, 3) for labelled in (0, 1)}


def test_each_network_is_told_by_the_other(found_small):
    told = []

    class Told(DivideMix):
        def begin_epoch(self, visit, rows, epoch):
            DivideMix.begin_epoch(self, visit, rows, epoch)
            N, real = len(visit.data.y), visit.data.real
            for w in range(2):
                logits = visit.review(rows[w * N : (w + 1) * N])[0]
                losses = -logits.log_softmax(-1).gather(2, visit.data.y[..., None])[..., 0]
                other = visit.notes["clean"][(1 - w) * N : (2 - w) * N]
                torch.testing.assert_close(other, clean_posteriors(losses, real), atol=1e-4, rtol=0)
                told.append(w)

    run_round(found_small(Told(warm_up=0)))
    assert set(told) == {0, 1}


@pytest.mark.parametrize("beta", [1, 4])
def test_shares_are_beta_and_partners_shuffled(beta):
    class Visit:
        streams = Streams(0, torch.arange(4000), 0)

    class Batch:
        number, y = 3, torch.zeros(4000, 3, dtype=torch.int64)

    real = torch.arange(6).expand(8000, 6) < 4
    share, partner = DivideMix(beta=beta)._mix(Visit(), Batch(), real)
    at_least_half = stats.beta(beta, beta)  # of which the larger of l and 1 - l is taken
    folded = lambda x: 2 * at_least_half.cdf(x) - 1
    assert stats.kstest(share[:, 0].double().numpy(), folded).pvalue > 1e-3  # one fixed draw, not a new one
    assert torch.equal(partner[:, :4].sort(1).values, torch.arange(4).expand(8000, 4))
    often = torch.nn.functional.one_hot(partner[:, :4], 4).double().mean(0)
    assert float((often - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 8000) ** 0.5


def test_where_all_labels_are_believed_nothing_is_unlabelled(found_small, monkeypatch):
    monkeypatch.setattr(dividemix, "clean_posteriors", lambda losses, real: real.float())
    federations = [found_small(DivideMix(warm_up=0, ramp=0, unlabelled=weight)) for weight in (0.0, 25.0)]
    for federation in federations:
        run_round(federation)
        assert federation.server["model"].isfinite().all()
    assert torch.equal(federations[0].server["model"], federations[1].server["model"])


def test_where_no_label_is_believed_it_still_learns(found_small, monkeypatch):
    monkeypatch.setattr(dividemix, "clean_posteriors", lambda losses, real: torch.zeros_like(losses))
    federation = found_small(DivideMix(warm_up=0, ramp=0))
    before = federation.server["model"]
    run_round(federation)
    assert federation.server["model"].isfinite().all()
    assert not torch.equal(federation.server["model"], before)


def test_texts_are_mixed_behind_their_words():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(1, 9, (20, 6), generator=generator), torch.randint(2, (20,), generator=generator)
    holdings = Holdings(x, y, list(torch.arange(20).split([12, 8])))
    federation = found(DivideMix(warm_up=0, ramp=0), Text(9, 2, width=4), holdings, Schedule(batch=4, epochs=2))
    before = federation.server["model"]
    run_round(federation)
    assert federation.server["model"].isfinite().all()
    assert not torch.equal(federation.server["model"], before)


def test_settings_are_checked():
    for wrong in ({"warm_up": -1}, {"threshold": 2.0}, {"temperature": 0.0}, {"beta": 0}):
        with pytest.raises(ValueError, match=r"warm_up|temperature"):
            DivideMix(**wrong)
