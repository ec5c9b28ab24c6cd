"""RobustFL: FedAvg without its terms, centroids by loops, and pseudo-labels where features disagree."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.digits import CLASSES, PIXELS, load_digits
from anabranch.federated.method import FedAvg
from anabranch.federated.methods.robustfl import RobustFL, class_means, gathered, moved
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule

GENERATOR = torch.Generator().manual_seed(3)


def cosine(a, b):
    return float(a @ b / max(float(a.norm() * b.norm()), 1e-30))


@pytest.mark.parametrize("drop_last", [False, True])
def test_without_its_terms_it_is_fedavg_to_the_bit(trained, drop_last, by_steps):
    plain = RobustFL(forget=0, trust=10, pull=0, entropy=0)
    assert torch.equal(trained(plain, drop_last=drop_last), trained(by_steps, drop_last=drop_last))


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(RobustFL(forget=0.4, ramp=2, trust=1, pull=0.1), rounds=4)


@pytest.mark.parametrize("summed", [False, True])
def test_the_loss_is_the_formula(found_small, summed):
    seen = []

    class Checked(RobustFL):
        def loss(self, visit, rows, batch):
            centroids = visit.notes["centroids"]
            found = RobustFL.loss(self, visit, rows, batch)
            out = visit.see(rows.detach(), batch.x)
            said = visit.see(visit.received, visit.data.x, training=False).logits.argmax(-1)
            for i, size in enumerate(batch.real.sum(1).tolist()):
                z, h, y = out.logits[i].double(), out.features[i].double(), batch.y[i].tolist()
                losses = [float(F.cross_entropy(z[b], batch.y[i, b])) for b in range(size)]
                S = sorted(range(size), key=lambda b: losses[b])[: size - int(0.3 * size)]
                expected = 0.0
                for b in S:
                    nearest = max(range(3), key=lambda c: cosine(centroids[i, c].double(), h[b].detach()))
                    target = y[b] if nearest == y[b] or visit.round < 2 else int(said[i, batch.which[i, b]])
                    seen.append((nearest == y[b], target == y[b]))
                    p = z[b].softmax(0)
                    expected += (float(-p[target].log()) + 0.8 * float(-(p * p.log()).sum())) / len(S)
                    if nearest == y[b]:
                        away = float((h[b] - centroids[i, y[b]].double()).square().sum())
                        expected += 0.5 * min(1, visit.round / 2) * away / (1 if summed else len(S))
                assert float(found[i].detach()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            return found

    federation = found_small(Checked(forget=0.3, ramp=0, trust=2, pull=0.5, summed=summed))
    for _ in range(3):
        run_round(federation)
    assert set(seen) == {(True, True), (False, True), (False, False)}  # believed, kept for want of trust, replaced


def test_centroids_of_a_client_move_towards_a_batch_by_the_square_of_the_cosine():
    features, y = torch.randn(2, 9, 5, generator=GENERATOR), torch.randint(3, (2, 9), generator=GENERATOR)
    chosen = torch.rand(2, 9, generator=GENERATOR) < 0.7
    y[1][chosen[1]] = 2  # a batch without two of the classes
    before = torch.randn(2, 4, 5, generator=GENERATOR)
    before[0, 1] = 0  # nobody has met this class
    means = class_means(features, y, chosen, 4)
    after = moved(before, means)
    for i in range(2):
        for c in range(4):
            mine = features[i][chosen[i] & (y[i] == c)]
            if len(mine) == 0:
                assert torch.equal(after[i, c], before[i, c])
                continue
            torch.testing.assert_close(means[i, c], mine.mean(0))
            s = cosine(before[i, c], mine.mean(0)) ** 2 if before[i, c].any() else 1
            torch.testing.assert_close(after[i, c], (1 - s) * before[i, c] + s * mine.mean(0))


def test_the_server_weighs_centroids_by_their_cosines():
    ours, theirs = torch.rand(3, 5, generator=GENERATOR), torch.rand(4, 3, 5, generator=GENERATOR)
    theirs[1, 2] = -theirs[1, 2]  # turned away: weighs nothing
    theirs[:3, 0] = 0
    ours[0] = 0  # new: the mean of those who have it
    after = gathered(ours, theirs)
    torch.testing.assert_close(after[0], theirs[3, 0])
    for c in (1, 2):
        weight = torch.tensor([max(0.0, cosine(ours[c], theirs[k, c])) for k in range(4)])
        torch.testing.assert_close(after[c], weight @ theirs[:, c] / weight.sum())
    nothing = gathered(ours, torch.zeros(4, 3, 5))
    assert torch.equal(nothing, ours)


def test_settings_are_checked():
    for wrong in ({"forget": 1}, {"trust": -1}, {"pull": -0.5}):
        with pytest.raises(ValueError, match="forget"):
            RobustFL(**wrong)


def test_pairwise_wrong_labels_are_not_learned():
    """40 % of each client's labels name the class before; what counts is the margin, in points of accuracy."""
    digits = load_digits(20, skew=0, generator=torch.Generator().manual_seed(0))
    x, y = digits.x.flatten(0, 1), digits.y.clone()
    wrong = 2 * y.shape[1] // 5  # the first of each client: these are shuffled already
    y[:, :wrong] = (y[:, :wrong] - 1) % CLASSES
    holdings = Holdings(x, y.flatten(), list(torch.arange(y.numel()).view(y.shape)))

    def accuracy(method):
        federation = found(method, MLP((PIXELS, 32, CLASSES)), holdings, Schedule(rounds=12))
        for _ in range(12):
            run_round(federation)
        said = forward(federation.network, federation.server["model"], digits.test_x[None]).logits[0].argmax(1)
        return float((said == digits.test_y).double().mean())

    assert accuracy(RobustFL(forget=0.4, ramp=4, trust=4, pull=0)) > accuracy(FedAvg()) + 0.05
