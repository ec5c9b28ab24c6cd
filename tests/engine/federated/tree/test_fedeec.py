"""The losses against their formulas, a round against loops written out, and what may not depend on what."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from anabranch.federated import local
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.rounds import Holdings
from anabranch.federated.streams import Streams
from anabranch.federated.tree import fedeec
from anabranch.federated.tree.bridge import fit
from anabranch.federated.tree.fedeec import FLOOR, Directed, Link, distance, found, move, run_round, stages
from anabranch.federated.tree.plan import SCHEDULE, FedEEC
from anabranch.federated.tree.topology import Tree, regular

C, D = 3, 6
SIZES = [7, 3, 12, 5, 4, 9]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holdings(sizes=SIZES):
    M = sum(sizes)
    x, y = drawn(M, D), torch.arange(M) % C
    return Holdings(x + 2 * F.one_hot(y, D), y, torch.arange(M).split(list(sizes)))


def bridge():
    """Of four numbers, which tell the classes apart."""
    public = drawn(30, D, seed=5) + 2 * F.one_hot(torch.arange(30) % C, D)
    return fit("pca:4", public, torch.Generator())


def hierarchy(tree=None, sizes=SIZES, widths=(4, 5, 8), schedule=SCHEDULE, **settings):
    tree = tree or regular((2, len(sizes)))
    networks = [MLP((D, width, C)) for width in widths]
    return found(FedEEC(**settings), tree, networks, holdings(sizes), bridge(), replace(schedule, batch=4, seed=9))


def learn(h, *stage, predictions=None):
    links = [Link(child, up) for child, up in stage]
    told = predictions or fedeec._predictions(h, links, fedeec.Counter(), fedeec.Counter(), 1)
    fedeec._learn(h, links, told, 1)
    return told


# The distance from the teacher


def test_the_slope_of_the_distance():
    B, T = 5, 3.0
    z, p = drawn(1, B, C).double().requires_grad_(), drawn(1, B, C, seed=1).double().softmax(-1)
    distance(z, p, T).mean().backward()
    wanted = T * ((z / T).softmax(-1) - p) / B
    assert_close(z.grad, wanted.detach(), atol=T * (C + 1) * FLOOR, rtol=0)


def test_the_distance_from_itself_is_nothing_but_the_floor():
    z, T = drawn(1, 4, C).double().requires_grad_(), 3.0
    value = distance(z, (z.detach() / T).softmax(-1), T)
    value.sum().backward()
    assert float(value.detach().abs().max()) <= 1.01 * T * T * C * FLOOR
    assert float(z.grad.abs().max()) <= T * C * FLOOR


def test_a_hot_distance_is_one_of_centred_logits():
    """The slope tends to the difference of centred logits over C; what is left falls as 1 / T."""
    z, teacher = drawn(1, 4, C).double().requires_grad_(), 2 * drawn(1, 4, C, seed=1).double()
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (z.detach(), teacher)]
    left = []
    for T in (100.0, 200.0):
        (slope,) = torch.autograd.grad(distance(z, (teacher / T).softmax(-1), T).sum(), z)
        left.append(float((slope - (centred[0] - centred[1]) / C).abs().max()))
    assert left[0] < 0.05
    assert left[1] / left[0] == pytest.approx(0.5, abs=0.05)


# One direction


def by_hand(h, student, child, *, height, p, settings, real):
    """SGD of one student written out, its batches in the order of the link's stream."""
    network, store = h.networks[height], h.stores[child]
    row, velocity = h.models[student].clone(), 0.0
    n = len(store)
    order = Streams(h.schedule.seed, torch.tensor([child]), h.round).order(torch.tensor([n]), n, 0)[0]
    for which in order.split(h.schedule.batch):
        leaf = row.clone().requires_grad_()
        views = {name: view[0] for name, view in network.layout.views(leaf[None]).items()}

        def logits(x, views=views):
            return torch.relu(x @ views["0.weight"] + views["0.bias"]) @ views["1.weight"] + views["1.bias"]

        y = h.labels[store[which]]
        z = logits(h.bridged[store[which]])
        loss = settings.ce * F.cross_entropy(z, y)
        if settings.beta:
            T = settings.temperature
            told = (p[which] + 1e-7).log()
            loss = loss + settings.beta * T**2 * F.kl_div(
                (z / T).log_softmax(1), told, reduction="batchmean", log_target=True
            )  # fmt: skip
        if real:
            loss = loss + settings.gamma * F.cross_entropy(logits(h.holdings.x[store[which]]), y)
        (slope,) = torch.autograd.grad(loss, leaf)
        velocity = h.schedule.momentum * velocity + slope
        row = row - h.schedule.lr * velocity
    return row


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {}, {"beta": 2.0, "gamma": 0.5, "ce": 0.0, "temperature": 2.0}])
def test_a_leaf_takes_the_steps_of_its_loss(settings):
    """With beta 0 it is local SGD on real and bridge samples."""
    h = hierarchy(rectify="off", **settings)
    teacher = h.models[1]
    x = h.bridged[h.stores[4]]
    p = (fedeec.predict(h.networks[1], teacher, x) / h.settings.temperature).softmax(1)
    wanted = by_hand(h, 4, 4, height=0, p=p, settings=h.settings, real=True)
    learn(h, (4, False))
    assert_close(h.models[4], wanted, atol=1e-6, rtol=1e-5)


def test_an_inner_student_sees_no_real_samples_and_has_a_weight_of_its_own():
    h = hierarchy(rectify="off", beta_inner=10.0)
    p = (fedeec.predict(h.networks[0], h.models[5], h.bridged[h.stores[5]]) / 3).softmax(1)
    wanted = by_hand(h, 1, 5, height=1, p=p, settings=FedEEC(beta=10.0), real=False)
    h.holdings.x.fill_(float("nan"))
    learn(h, (5, True))
    assert_close(h.models[1], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("up", [False, True])
def test_only_the_student_learns(up):
    h = hierarchy()
    before = [model.clone() for model in h.models]
    learn(h, (6, up))
    student = h.tree.parents[6] if up else 6
    assert [v for v, model in enumerate(h.models) if not torch.equal(model, before[v])] == [student]


def test_a_student_knows_of_its_teacher_what_has_arrived():
    """Another teacher whose predictions arrive as the same: not a bit is different."""
    ends = []
    for seed in (1, 2):
        h = hierarchy()
        h.models[1] = drawn(len(h.models[1]), seed=seed)
        n = len(h.stores[4])
        learn(h, (4, False), predictions=[torch.full((n, C), 1 / C)])
        ends.append(h.models[4])
    assert torch.equal(*ends)


def test_teachers_speak_in_evaluation_and_once_for_each_sample():
    h = hierarchy(rectify="ring:5")
    seen = []
    h.channel.send = lambda kind, child, values, up: seen.append((kind, child, values.shape, up)) or values
    learn(h, (4, False), (6, True))
    assert seen == [
        ("predictions", 4, (len(h.stores[4]), C), False), ("predictions", 6, (len(h.stores[6]), C), True)
    ]  # fmt: skip
    assert int(h.rings[1].counts.sum()) + int(h.rings[6].counts.sum()) > 0
    assert all(int(h.rings[v].counts.sum()) == 0 for v in range(9) if v not in (1, 6))


# Together and alone


def after(rounds=2, **settings):
    h = hierarchy(**settings)
    done = [run_round(h) for _ in range(rounds)]
    return h, done


@pytest.mark.parametrize("sequential", [False, True])
def test_a_group_learns_as_each_of_it_would_alone(sequential, monkeypatch):
    together, _ = after(sequential=sequential)
    monkeypatch.setattr(local, "CACHED_NUMBERS", 1)
    alone, _ = after(sequential=sequential)
    for a, b in zip(together.models, alone.models, strict=True):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(local, "CACHED_NUMBERS", 100)
    one, many = hierarchy(), hierarchy()
    for _ in range(2):
        run_round(one)
        run_round(many, threads=3)
    assert all(map(torch.equal, one.models, many.models))
    assert all(torch.equal(a.values, b.values) for a, b in zip(one.rings, many.rings, strict=True))


def test_learning_from_a_parent_is_the_same_in_any_order_of_the_siblings():
    """For rules without a history. Their parent's learning is not: it goes through them by number."""
    downs, ups = [], []
    for order in ([4, 5, 3], [3, 4, 5], [5, 4, 3]):
        h = hierarchy(schedule=replace(SCHEDULE, lr=0.2), rectify="mix")
        learn(h, *((child, False) for child in order))
        downs.append([h.models[child] for child in (3, 4, 5)])
        for child in order:
            learn(h, (child, True))
        ups.append(h.models[1])
    for other in downs[1:]:
        for a, b in zip(downs[0], other, strict=True):
            assert torch.equal(a, b)
    assert not torch.allclose(ups[0], ups[1], atol=1e-3)


def test_relabelled_siblings_learn_what_they_learnt():
    """Two leaves change numbers, samples and first weights; a batch is a whole store, so its order says nothing."""
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        sizes = [SIZES[i] for i in order]
        whole = holdings(SIZES[:3])
        parts = [whole.owned[i] for i in order]
        h = hierarchy(tree=regular((1, 3)), sizes=SIZES[:3], schedule=replace(SCHEDULE, lr=0.2), rectify="swap")
        first = h.models
        dealt, whole_stores = whole._replace(owned=parts), replace(h.schedule, batch=100)
        mixed = found(h.settings, h.tree, h.networks, dealt, bridge(), whole_stores)
        mixed.models = [*first[:2], *(first[2 + i] for i in order)]
        learn(mixed, *((v, False) for v in (2, 3, 4)))
        assert [len(s) for s in mixed.stores[2:]] == sizes
        ends.append([mixed.models[2 + order.index(i)] for i in range(3)])
    for a, b in zip(*ends, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


# The round


def test_the_published_order_and_the_one_of_tiers():
    tree = regular((2, 3))  # 0; 1 2; 3 4 under 1, 5 under 2
    flat = [(child, up) for stage in stages(tree, sequential=True) for child, up in stage]
    assert flat == [(v, up) for v in (3, 4, 1, 5, 2) for up in (False, True)]
    assert [[tuple(link) for link in stage] for stage in stages(tree, sequential=False)] == [
        [(3, False), (4, False), (5, False)], [(3, True), (5, True)], [(4, True)],
        [(1, False), (2, False)], [(1, True)], [(2, True)],
    ]  # fmt: skip


@pytest.mark.parametrize("sequential", [False, True])
def test_every_link_is_used_once_each_way_and_after_the_links_below(sequential):
    tree = Tree(parents=(-1, 0, 1, 1, 0, 2, 2))  # leaves 3, 4, 5, 6 at four depths
    order = [link for stage in stages(tree, sequential=sequential) for link in stage]
    assert sorted(order) == sorted(Link(v, up) for v in range(1, 7) for up in (False, True))
    for v in range(1, 7):
        below = [order.index(Link(child, True)) for child in tree.children[v]]
        assert max(below, default=-1) < order.index(Link(v, False)) < order.index(Link(v, True))
    for stage in stages(tree, sequential=sequential):
        students = [fedeec._ends(tree, link)[0] for link in stage]
        assert len(set(students)) == len(students)
        assert not set(students) & {fedeec._ends(tree, link)[1] for link in stage}


def test_what_crosses_is_counted_to_the_byte():
    h = hierarchy()
    E = 4
    assert all(crossing.up and crossing.kind != "predictions" for crossing in h.channel.bytes)
    assert sum(h.channel.take().values()) == 2 * sum(SIZES) * (4 * E + 4)  # from leaves and from edges
    run_round(h)
    crossed = h.channel.take()
    assert {crossing.kind for crossing in crossed} == {"predictions"}
    assert len(crossed) == 2 * 8
    for crossing, count in crossed.items():
        assert count == 4 * C * len(h.stores[crossing.child])
    other = hierarchy(sequential=True)
    other.channel.take()
    run_round(other)
    assert other.channel.take() == crossed


def test_what_was_wrong_is_counted_by_the_height_of_the_teacher():
    h, (first, second) = after(rectify="off")
    M = sum(SIZES)
    assert first.told == [M, 2 * M, M]  # leaves upwards, edges both ways, the root downwards
    assert all(0 < wrong <= told for wrong, told in zip(first.wrong, first.told, strict=True))
    assert sum(second.wrong) < sum(first.wrong)
    assert h.round == 2


def test_stores_are_those_of_the_leaves_one_after_another():
    h = hierarchy()
    assert [len(s) for s in h.stores[3:]] == SIZES
    for v, below in enumerate(h.tree.children):
        if below:
            assert torch.equal(h.stores[v], torch.cat([h.stores[child] for child in below]))
    assert torch.equal(h.stores[0], torch.arange(sum(SIZES)))
    assert torch.equal(h.labels, h.holdings.y)
    assert_close(h.bridged, bridge().decode(bridge().encode(h.holdings.x)))


def test_everybody_learns_from_what_reached_the_root(monkeypatch):
    send = fedeec.Channel.send
    monkeypatch.setattr(fedeec.Channel, "send", lambda *a, **k: send(*a, **k).mul_(0))
    h = hierarchy()
    assert int(h.labels.max()) == 0
    assert torch.equal(h.bridged, h.bridged[:1].expand_as(h.bridged))


@pytest.mark.parametrize(
    ("tree", "sizes", "widths"), [((3,), [5, 9, 2], (4, 8)), ((1,), [6], (4, 8)), ((1, 2, 3), [4, 5, 6], (4, 8, 8, 16))]
)
def test_trees_of_other_depths(tree, sizes, widths):
    h = hierarchy(tree=regular(tree), sizes=sizes, widths=widths, schedule=replace(SCHEDULE, lr=0.05))
    before = [model.clone() for model in h.models]
    for _ in range(25):
        run_round(h)
    assert not any(map(torch.equal, before, h.models))
    named = fedeec.predict(h.networks[-1], h.models[0], h.bridged).argmax(1)
    assert float((named == h.labels).double().mean()) > 0.8  # 0.33 if it had learnt nothing


def test_pictures_and_networks_of_pictures():
    x, y = drawn(12, 1, 8, 8), torch.arange(12) % C
    networks = [CNN(1, 8, 8, C, wide=4, features=8), ResNet(1, 8, 8, C, wide=8, blocks=(1, 1, 1, 1))]
    five = fit("pca:5", drawn(9, 1, 8, 8, seed=1), torch.Generator())
    data = Holdings(x, y, torch.arange(12).split([5, 7]))
    h = found(FedEEC(networks=("cnn", "resnet10")), regular((2,)), networks, data, five, replace(SCHEDULE, batch=4))
    run_round(h, threads=2)
    assert all(bool(model.isfinite().all()) for model in h.models)


# Moving


def test_a_leaf_moves_with_its_samples():
    h = hierarchy()
    h.channel.take()
    before, roots = h.stores[0], [model.clone() for model in h.models]
    move(h, 4, 2)
    n = SIZES[1]
    assert h.tree.parents[4] == 2
    assert torch.equal(h.stores[0].sort().values, before.sort().values)
    assert torch.equal(h.stores[2], torch.cat([h.stores[v] for v in (4, 6, 7, 8)]))
    assert len(h.stores[1]) == SIZES[0] + SIZES[2]
    assert all(map(torch.equal, h.models, roots))
    assert {(c.child, c.kind): count for c, count in h.channel.take().items()} == {
        (4, "embeddings"): 16 * n,
        (4, "labels"): 4 * n,
    }  # fmt: skip  (the root has them already)


def test_above_the_new_parent_only_those_who_did_not_know_are_told():
    h = hierarchy(tree=regular((2, 4, 6)), widths=(3, 4, 5, 6))  # leaves 7 .. 12; 7 under 3 under 1, 12 under 6 under 2
    h.channel.take()
    assert h.tree.above(7) == [3, 1, 0]
    assert h.tree.above(12) == [6, 2, 0]
    move(h, 7, 6)
    assert {crossing.child for crossing in h.channel.take()} == {7, 6}


def test_some_leaves_move_between_rounds_the_same_ones_again():
    def parents(rounds):
        h = hierarchy(migrate=0.3)
        moved = [run_round(h).moved for _ in range(rounds)]
        return h.tree.parents, moved, sorted(h.stores[0].tolist())

    first, again = parents(4), parents(4)
    assert first == again
    assert first[1][0] == 0
    assert 0 < sum(first[1]) <= 2 * 3
    assert first[2] == list(range(sum(SIZES)))
    assert first[0] != regular((2, 6)).parents


def test_first_weights_are_a_nodes_own():
    """So a larger root leaves its federation as it was."""
    small, large = hierarchy(), hierarchy(widths=(4, 5, 50))
    assert all(map(torch.equal, small.models[1:], large.models[1:]))
    assert not torch.equal(small.models[4], small.models[5])


# What is refused


def test_what_does_not_fit_is_refused():
    tree, data = regular((2, 6)), holdings()
    networks = [MLP((D, 4, C))] * 3
    with pytest.raises(ValueError, match="needs a network for each height, got 2"):
        found(FedEEC(), tree, networks[:2], data, bridge(), SCHEDULE)
    with pytest.raises(ValueError, match="every one of 6 leaves needs samples, got those of 5"):
        found(FedEEC(), tree, networks, data._replace(owned=data.owned[:5]), bridge(), SCHEDULE)
    with pytest.raises(ValueError, match="every one of 6 leaves needs samples"):
        found(FedEEC(), tree, networks, data._replace(owned=[*data.owned[:5], torch.tensor([])]), bridge(), SCHEDULE)
    batch = ResNet(1, 8, 8, C, wide=8, norm="batch")
    with pytest.raises(ValueError, match="without batch statistics"):
        found(FedEEC(), tree, [*networks[:2], batch], data, bridge(), SCHEDULE)


@pytest.mark.parametrize("change", [{"share": 0.5}, {"augment": True}, {"decorrelation": 0.1}])
def test_what_a_tree_would_not_heed_is_refused(change):
    with pytest.raises(ValueError, match="no share, augment, decorrelation"):
        hierarchy(schedule=replace(SCHEDULE, **change))


def test_a_term_without_weight_is_left_out():
    h = hierarchy(beta=0.0, gamma=0.0)
    h.holdings.x.fill_(float("nan"))
    learn(h, (4, False), predictions=[torch.full((SIZES[1], C), float("nan"))])
    assert bool(h.models[4].isfinite().all())
    assert Directed(temperature=1.0, ce=1.0, beta=0.0, gamma=0.0).networks == 1
