"""The causal transition matrix beside a loop over samples, its two networks exchanged, and clients on their own."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.federated.method import Visit
from anabranch.federated.methods.causal_transition import DECAY, CausalTransition
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import epoch, pack
from anabranch.federated.rounds import run_round
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams

BASE = MLP((6, 7, 3))
SIZES = 5, 3  # samples of two clients
FULL = {"warm_up": 1, "forget": 0.4, "ramp": 0, "factors": 4}


class Swapped(Streams):
    """Each network gets the other's numbers."""

    def uniform(self, count, purpose, part=0):
        drawn = Streams.uniform(self, count, purpose, part)
        return drawn.view(len(drawn), -1, 2, 4).flip(2).flatten(1)


def visit_of(method, streams=Streams, round=3):
    """A visit of two clients, rows of both networks whose heads are not zero, and the only batch."""
    generator = torch.Generator().manual_seed(5)
    network = method.network(BASE)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    data, clients = pack(x, y, list(torch.arange(8).split(SIZES))), torch.arange(2)
    rows = torch.stack([network.first(generator) for _ in range(2)]).repeat_interleave(2, 0)
    rows[:, : network.heads] += torch.randn(2, network.heads, generator=generator).repeat_interleave(2, 0)
    visit = Visit(
        network=network, schedule=Schedule(rounds=7, batch=5), round=round, clients=clients, data=data, received=rows,
        sent={}, kept=method.fresh(network, data), streams=streams(0, clients, round),
    )  # fmt: skip
    (batch,) = epoch(data, visit.streams, 0, size=5, drop_last=False)
    return visit, rows, batch


def loss_by_hand(method, visit, rows, batch, baseline):
    """[4] and rewards [4, B], sample by sample, of network w and client n at 2 w + n; `baseline` [4], None: no pull."""
    views, net = visit.network.layout.views(rows), visit.network
    seen = [[None] * 5 for _ in range(4)]
    uniform = visit.streams.uniform(5 * 2 * 4, 3, batch.number).view(2, 5, 2, 4)
    for row in range(4):
        w, n = divmod(row, 2)
        of = {name: value[row] for name, value in views.items()}
        for b in range(SIZES[n]):
            h = torch.relu(batch.x[n, b] @ of["0.weight"] + of["0.bias"])
            s = h @ of["separation.weight"] + of["separation.bias"]
            m = (uniform[n, b, w] < s.sigmoid()).float()
            wide = m[[0, 0, 1, 1, 2, 2, 3]]
            p = (((1 - wide) * h) @ of["1.weight"] + of["1.bias"]).softmax(0)
            A = ((wide * h) @ of["transition.weight"] + of["transition.bias"]).view(3, 3)
            T = (1 - method.eps) * (A + method.near * torch.eye(3)).softmax(1) + method.eps / 3
            y = int(batch.y[n, b])
            seen[row][b] = (p[y], (p @ T)[y], T[y, y], s, m, (1 - wide) * h, wide * h)
    losses, rewards = [], torch.zeros(4, 5)
    for row in range(4):
        w, n = divmod(row, 2)
        size = SIZES[n]
        peer = seen[2 * (1 - w) + n]
        chosen = sorted(range(size), key=lambda b: -peer[b][0])[: size - int(0.4 * size)]
        loss = 0.0
        for b in range(size):
            p_y, q_y, T_yy, s, m, *_ = seen[row][b]
            loss = loss - q_y.log() / size
            pi = s.sigmoid()
            entropy = -(pi * pi.log() + (1 - pi) * (1 - pi).log()).sum()
            loss = loss - method.entropy * entropy / size
            rewards[row, b] = q_y.log() - method.kappa * m.mean()
            if b in chosen:
                loss = loss - (p_y.log() + method.anchor * T_yy.log()) / len(chosen)
                rewards[row, b] += p_y.log()
            if baseline is not None:
                said = (m * pi.log() + (1 - m) * (1 - pi).log()).sum()
                loss = loss - method.policy * (rewards[row, b] - baseline[row]) * said / size
        h1, h2 = (torch.stack([seen[row][b][i] for b in range(size)]) for i in (5, 6))
        both = [(h - h.mean(0)) for h in (h1, h2)]
        units = [c / c.norm(dim=0).clamp_min(1e-9) for c in both]
        losses.append(loss + method.decorrelation * (units[0].T @ units[1]).square().mean())
    assert net.width == 2
    return torch.stack(losses), rewards


def test_the_loss_is_that_of_a_loop_over_samples():
    method = CausalTransition(**FULL)
    visit, rows, batch = visit_of(method)
    with torch.no_grad():
        found = method.loss(visit, rows, batch)
        expected, rewards = loss_by_hand(method, visit, rows, batch, None)
        assert_close(found, expected)  # nothing is pulled before there is a mean reward
        mean = torch.stack([rewards[row, : SIZES[row % 2]].mean() for row in range(4)])
        assert visit.kept["steps"].tolist() == [1, 1]
        expected, _ = loss_by_hand(method, visit, rows, batch, mean)
        assert_close(method.loss(visit, rows, batch), expected)
    # the mean is of the rewards so far, with all weights: (1 - d) d and (1 - d) over their sum
    assert_close(visit.kept["reward"].T.flatten() / (1 - DECAY**2), mean)


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
def test_networks_exchanged_are_losses_and_slopes_exchanged(estimator):
    method = CausalTransition(estimator=estimator, **FULL)
    results = []
    for streams, order in ((Streams, [0, 1, 2, 3]), (Swapped, [2, 3, 0, 1])):
        visit, rows, batch = visit_of(method, streams)
        rows = rows[order].requires_grad_()
        for _ in range(2):  # with a mean reward the second time
            loss = method.loss(visit, rows, batch)
        (slope,) = torch.autograd.grad(loss.sum(), rows)
        results.append((loss.detach()[order], slope[order]))
    assert_close(results[0], results[1])


def test_the_separation_learns_from_rewards_and_never_through_the_features():
    method = CausalTransition(**FULL, decorrelation=0.0, entropy=0.0)
    visit, rows, batch = visit_of(method)
    rows = rows.requires_grad_()
    first, second = (torch.autograd.grad(method.loss(visit, rows, batch).sum(), rows)[0] for _ in range(2))
    views = [visit.network.layout.views(slope) for slope in (first, second)]
    assert not views[0]["separation.weight"].any()
    assert views[1]["separation.weight"].any()
    for name in ("0.weight", "1.weight", "transition.weight"):
        assert torch.equal(views[0][name], views[1][name])


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
@pytest.mark.parametrize("local", [True, False])
def test_alone_and_together(same_alone_and_together, estimator, local):
    same_alone_and_together(CausalTransition(estimator=estimator, local=local, **FULL), rounds=3)


def test_warming_up_leaves_the_heads_as_they_are(found_small):
    federation = found_small(CausalTransition(warm_up=2))
    before = federation.server["model"].clone()
    H = federation.network.heads
    for changed in (False, False, True):
        run_round(federation)
        assert bool(federation.server["model"][:, :H].any()) == changed
        assert not torch.equal(federation.server["model"][:, H:], before[:, H:])


def test_clients_go_on_with_heads_of_their_own(found_small):
    federation = found_small(CausalTransition(**FULL))
    for _ in range(3):
        run_round(federation)
    H, counts = federation.network.heads, torch.tensor([len(one) for one in federation.holdings.owned])
    own = torch.stack([federation.kept[k]["heads"] for k in range(4)])
    assert not torch.equal(own[0], own[1])
    mean = torch.einsum("k,kwh->wh", counts / counts.sum(), own)
    assert_close(federation.server["model"][:, :H], mean, atol=1e-6, rtol=1e-5)
    begun = {}

    class Looking(CausalTransition):
        def begin_epoch(self, visit, rows, epoch):
            begun.update(
                zip(visit.clients.tolist(), rows.view(2, -1, rows.shape[1]).transpose(0, 1).clone(), strict=True)
            )

    federation.method = Looking(**FULL)
    federation.kept[3]["steps"].zero_()  # as if it had never been there
    model = federation.server["model"]
    federation.schedule = Schedule(epochs=1, batch=4)
    run_round(federation)
    for k in range(4):
        assert torch.equal(begun[k][:, :H], own[k] if k < 3 else model[:, :H])
        assert torch.equal(begun[k][:, H:], model[:, H:])


def test_for_a_single_client_local_heads_are_the_model_s(found_small):
    models = []
    for local in (True, False):
        federation = found_small(CausalTransition(local=local, **FULL))
        federation.holdings = federation.holdings._replace(owned=[torch.arange(38)])
        for _ in range(3):
            run_round(federation)
        models.append(federation.server["model"])
    assert torch.equal(*models)


def test_what_is_told_is_counted_over_samples_and_networks():
    method = CausalTransition(**FULL)
    visit, rows, _ = visit_of(method)
    told = method.reply(visit, rows)
    views = visit.network.layout.views(rows)
    for n, size in enumerate(SIZES):
        diagonal, joint, sensitive = [], torch.zeros(3, 3), []
        for row in (n, 2 + n):
            of = {name: value[row : row + 1] for name, value in views.items()}
            h = torch.relu(visit.data.x[n, :size] @ of["0.weight"][0] + of["0.bias"][0])[None]
            s = visit.network.separate(of, h)
            parts = visit.network.parts(of, h, (s > 0).float())
            T = (1 - method.eps) * parts.transition[0].softmax(-1) + method.eps / 3
            diagonal += [float(one.diagonal().mean()) for one in T]
            sensitive += s.sigmoid().flatten().tolist()
            for p, one in zip(parts.logits[0].softmax(-1), T, strict=True):
                joint += p[:, None] * one / (2 * size)
        assert float(told["diagonal"][n]) == pytest.approx(sum(diagonal) / len(diagonal), rel=1e-5)
        assert float(told["sensitive"][n]) == pytest.approx(sum(sensitive) / len(sensitive), rel=1e-5)
        assert_close(told["joint"][n], joint)


def test_the_server_knows_a_matrix_of_classes(found_small):
    federation = found_small(CausalTransition(**FULL))
    assert not federation.server["diagonal"].isnan().any()
    run_round(federation)
    assert_close(federation.server["transition"].sum(1), torch.ones(3))
    assert federation.server["diagonal"].shape == federation.server["sensitive"].shape == (4,)


def test_both_networks_vote():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    (voted,) = CausalTransition().vote(logits)
    assert_close(voted.exp(), (logits[0].softmax(1) + logits[1].softmax(1)) / 2)


def test_settings_are_checked():
    for wrong in ({"warm_up": -1}, {"forget": 1.0}, {"factors": 0}, {"eps": 0.0}, {"kappa": -0.1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            CausalTransition(**wrong)
