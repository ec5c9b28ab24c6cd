"""FedEEC: nodes of a tree learn from their neighbours' predictions on samples that both can make. arXiv 2501.00693

    L = CE(f(xb), y) + beta KD(f(xb), t(xb)) + gamma CE(f(x), y)          the last term in leaves only
    KD = T^2 KL(rectified softmax(t / T) + 1e-7 || softmax(f / T))        mean over a batch

of a student f and a teacher t, its parent or one of its children. xb is the bridge sample (bridge.py) of one of the
child's samples x, of class y. One step of SGD for each batch; once through the child's samples in each direction and
round. No weights cross a link, so that models may grow from tier to tier, and a leaf may move to another parent.

From FedAgg's demo   (2312.11489, the conference version; no code of FedEEC was found) the losses, the floor of 1e-7,
                     one pass over the smaller store, which is the child's.
Reconstructed here   the rectification (rectify.py). Momentum starts from zero in every direction; batches are shuffled,
                     both directions of a link in the same order.
Order                By default all nodes of a height learn from their parents together, then each of their parents
                     from its children in the order of their numbers, and so on upwards: siblings do not meet what
                     their parent learnt from each other in this round. `sequential` is the published order: for each
                     node after its children, it learns from its parent and its parent from it. The same bytes cross.
                     In both orders, what a parent becomes depends on the numbers of its children; so do, a little, the
                     children of a parent whose rule has a history, for it goes from one to the next.
Left out on purpose  the demo's networks that are shared by the j-th leaves of all edges; teachers in training mode,
                     whose running statistics follow the bridge samples. Its inner students' weight of 10 is
                     `beta_inner=10`.
Shared               local.py takes the steps, for all students of a group together.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.evaluate import predict
from anabranch.federated.experiment import generator
from anabranch.federated.local import group_size, train
from anabranch.federated.method import FedAvg, Visit, batch_mean, cross_entropy
from anabranch.federated.networks.layout import Network
from anabranch.federated.packed import Batch, pack
from anabranch.federated.rounds import BACKWARD, Holdings, each
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import NOBODY, Purpose, Streams
from anabranch.federated.tree.bridge import Bridge
from anabranch.federated.tree.channel import Channel
from anabranch.federated.tree.plan import FedEEC
from anabranch.federated.tree.rectify import Ring, empty, parse_rule, wrong
from anabranch.federated.tree.topology import ROOT, Tree

FLOOR = 1e-7


class Link(NamedTuple):
    """One direction of a link.

    child   its lower node
    up      the parent learns from the child, or else the child from the parent
    """

    child: int
    up: bool


@dataclass(slots=True, kw_only=True)
class Hierarchy:
    """A tree between two rounds.

    networks    of each height
    holdings    the leaves' own samples; the k-th leaf's are owned[k]
    embeddings  [M, E]      of all samples, as the root got them
    bridged     [M, ...]    what everybody makes of them
    labels      [M] int64   as the root got them
    models      [D] of each node
    rings       of each node: how sure it was where it was right
    stores      [n] int64 of each node: the samples that it can make, its own or those of its children one after another
    round       the next
    """

    settings: FedEEC
    schedule: Schedule
    tree: Tree
    networks: Sequence[Network]
    holdings: Holdings
    channel: Channel
    embeddings: Tensor
    bridged: Tensor
    labels: Tensor
    models: list[Tensor]
    rings: list[Ring]
    stores: list[Tensor]
    round: int = 0


class Round(NamedTuple):
    """What happened.

    told   [H] predictions that teachers of each height handed on
    wrong  [H] those of them whose largest entry was not the class, which a rule repairs
    moved  leaves that went to another parent
    """

    told: list[int]
    wrong: list[int]
    moved: int


def found(
    settings: FedEEC, tree: Tree, networks: Sequence[Network], holdings: Holdings, bridge: Bridge, schedule: Schedule
) -> Hierarchy:
    """A tree before its first round: embeddings and labels have gone up to the root, all models are as they are drawn.

    networks  of each height; ValueError for those that need a batch to normalise by
    """
    if len(networks) != tree.heights[ROOT] + 1:
        raise ValueError(f"a tree of height {tree.heights[ROOT]} needs a network for each height, got {len(networks)}")
    if any(network.batch_statistics for network in networks):
        raise ValueError("bridge and real samples go through a network together; take one without batch statistics")
    if schedule.share < 1 or schedule.augment or schedule.decorrelation:
        raise ValueError(
            "in a tree everybody takes part, and samples are shown as they are: no share, augment, decorrelation"
        )
    if len(holdings.owned) != len(tree.leaves) or min(map(len, holdings.owned)) < 1:
        raise ValueError(f"every one of {len(tree.leaves)} leaves needs samples, got those of {len(holdings.owned)}")
    drawn = (generator(schedule.seed, f"node {v}") for v in range(len(tree.parents)))  # whatever the others' networks
    models = [networks[height].first(draw) for height, draw in zip(tree.heights, drawn, strict=True)]
    _, length = parse_rule(settings.rectify)
    M, C = len(holdings.y), networks[0].classes
    h = Hierarchy(
        settings=settings, schedule=schedule, tree=tree, networks=networks, holdings=holdings,
        channel=Channel(C, bridge.size), embeddings=torch.zeros(M, bridge.size), bridged=torch.zeros_like(holdings.x),
        labels=torch.zeros(M, dtype=torch.int64), models=models, rings=[empty(C, length) for _ in models],
        stores=stores(tree, holdings.owned),
    )  # fmt: skip
    _send_up(h, bridge)
    return h


def _send_up(h: Hierarchy, bridge: Bridge) -> None:
    """Every node sends its store to its parent, after its children; the bridge samples are made once and kept."""
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf, owned in zip(h.tree.leaves, h.holdings.owned, strict=True):
        held[leaf] = bridge.encode(h.holdings.x[owned]), h.holdings.y[owned]
    for v in h.tree.post_order:
        if h.tree.children[v]:
            arrived = [_cross(h, child, *held.pop(child)) for child in h.tree.children[v]]
            held[v] = torch.cat([e for e, _ in arrived]), torch.cat([y for _, y in arrived])
    store = h.stores[ROOT]
    h.embeddings[store], h.labels[store] = held[ROOT]
    h.bridged[store] = bridge.decode(h.embeddings[store])


def _cross(h: Hierarchy, child: int, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    e = h.channel.send("embeddings", child, embeddings, up=True)
    return e, h.channel.send("labels", child, labels[:, None].int(), up=True)[:, 0].long()


def stores(tree: Tree, owned: Sequence[Tensor]) -> list[Tensor]:
    """The samples of each node: a leaf's own, an inner node's those of its children in the order of their numbers."""
    of_leaf = dict(zip(tree.leaves, owned, strict=True))
    found: dict[int, Tensor] = {}
    for v in tree.post_order:
        below = tree.children[v]
        found[v] = torch.cat([found[child] for child in below]) if below else of_leaf[v]
    return [found[v] for v in range(len(tree.parents))]


def stages(tree: Tree, *, sequential: bool) -> Iterator[list[Link]]:
    """Links of a round, one stage after another. Within a stage nobody learns twice or teaches what it learns there."""
    if sequential:
        for child in tree.post_order[:-1]:
            yield from ([Link(child, False)], [Link(child, True)])
        return
    for height in range(tree.heights[ROOT]):
        nodes = [v for v in tree.of_height(height) if v != ROOT]
        yield [Link(v, False) for v in nodes]
        families = [[v for v in below if tree.heights[v] == height] for below in tree.children]
        for turn in zip_longest(*families):
            yield [Link(v, True) for v in turn if v is not None]


def run_round(hierarchy: Hierarchy, *, threads: int = 1) -> Round:
    """Leaves move, then everybody learns; the tree is one round older. The result does not depend on the threads."""
    h = hierarchy
    moved = migrate(h) if h.settings.migrate and h.round else 0
    told: Counter[int] = Counter()
    amiss: Counter[int] = Counter()
    for stage in stages(h.tree, sequential=h.settings.sequential):
        _learn(h, stage, _predictions(h, stage, told, amiss, threads), threads)
    h.round += 1
    heights = range(len(h.networks))
    return Round([told[i] for i in heights], [amiss[i] for i in heights], moved)


def _ends(tree: Tree, link: Link) -> tuple[int, int]:
    """Student and teacher."""
    ends = link.child, tree.parents[link.child]
    return ends[::-1] if link.up else ends


def _predictions(
    h: Hierarchy, stage: Sequence[Link], told: "Counter[int]", amiss: "Counter[int]", threads: int
) -> list[Tensor]:
    """[n, C] of each link: what the teacher says of the child's store, rectified by itself, and sent."""
    rule, _ = parse_rule(h.settings.rectify)
    taught: dict[int, list[Link]] = {}
    for link in stage:
        taught.setdefault(_ends(h.tree, link)[1], []).append(link)
    arrived: dict[Link, Tensor] = {}
    for (teacher, links), logits in each(partial(_say, h), taught.items(), threads):
        p, height = F.softmax(logits / h.settings.temperature, 1), h.tree.heights[teacher]
        y = torch.cat([h.labels[h.stores[link.child]] for link in links])
        told[height] += len(y)
        amiss[height] += int(wrong(p, y).sum())
        p, h.rings[teacher] = rule(p, y, h.rings[teacher])  # from link to link, as they stand in the stage
        for link, part in zip(links, p.split([len(h.stores[link.child]) for link in links]), strict=True):
            arrived[link] = h.channel.send("predictions", link.child, part, up=link.up)
    return [arrived[link] for link in stage]


def _say(h: Hierarchy, taught: tuple[int, list[Link]]) -> Tensor:
    """Logits of a teacher on the stores of some links, one after another."""
    teacher, links = taught
    x = torch.cat([h.bridged.index_select(0, h.stores[link.child]) for link in links])
    return predict(h.networks[h.tree.heights[teacher]], h.models[teacher], x)


def _learn(h: Hierarchy, stage: Sequence[Link], predictions: Sequence[Tensor], threads: int) -> None:
    """Every student of a stage takes its steps, those of one height in groups of about as many samples."""
    told = dict(zip(stage, predictions, strict=True))
    groups: list[list[Link]] = []
    for height, network in enumerate(h.networks):
        mine = [link for link in stage if h.tree.heights[_ends(h.tree, link)[0]] == height]
        mine.sort(key=lambda link: (len(h.stores[link.child]), link.child))
        flops = BACKWARD * network.flops * h.schedule.batch * (1 + (height == 0))
        size = group_size(len(mine), network.layout.size, flops)
        groups += [mine[i : i + size] for i in range(0, len(mine), size)]
    for group, rows in each(lambda group: _lesson(h, group, [told[link] for link in group]), groups, threads):
        for link, row in zip(group, rows, strict=True):
            h.models[_ends(h.tree, link)[0]] = row


def _lesson(h: Hierarchy, group: Sequence[Link], predictions: Sequence[Tensor]) -> Tensor:
    """What students of one height become: rows [N, D]."""
    s, links = h.settings, torch.tensor([link.child for link in group])
    students = [_ends(h.tree, link)[0] for link in group]
    height = h.tree.heights[students[0]]
    data = pack(h.bridged, h.labels, [h.stores[link.child] for link in group])
    most = data.y.shape[1]
    told = torch.stack([F.pad(p, (0, 0, 0, most - len(p))) for p in predictions])
    beta = s.beta if height == 0 or s.beta_inner is None else s.beta_inner
    real = h.holdings.x if height == 0 and s.gamma else None
    return train(
        Directed(temperature=s.temperature, ce=s.ce, beta=beta, gamma=s.gamma, real=real),
        Visit(
            network=h.networks[height], schedule=h.schedule, round=h.round, clients=links, data=data,
            received=torch.stack([h.models[v] for v in students]), sent={"predictions": told}, kept={},
            streams=Streams(h.schedule.seed, links, h.round),
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Directed(FedAvg):
    """One direction of a link, of N students at once; `sent["predictions"]` [N, n, C] are their teachers'.

    real  [M, ...]  the samples whose embeddings are decoded, of students that have them
    """

    temperature: float
    ce: float
    beta: float
    gamma: float
    real: Tensor | None = None

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        x, B = batch.x, batch.y.shape[1]
        if self.real is not None:
            own = self.real[batch.take(visit.data.owned)]
            x = torch.cat([x, own], 1)
        logits = visit.see(rows, x).logits
        total = self.ce * cross_entropy(logits[:, :B], batch.y)
        if self.beta:
            told = batch.take(visit.sent["predictions"])
            total = total + self.beta * distance(logits[:, :B], told, self.temperature)
        if self.real is not None:
            total = total + self.gamma * cross_entropy(logits[:, B:], batch.y)
        return batch_mean(total, batch)


def distance(logits: Tensor, told: Tensor, temperature: float) -> Tensor:
    """T^2 KL(told + 1e-7 || softmax(logits / T)) of each sample: [..., C] twice -> [...]."""
    aim = told + FLOOR
    each_class = aim * (aim.log() - F.log_softmax(logits / temperature, -1))
    return temperature**2 * each_class.sum(-1)


def migrate(h: Hierarchy) -> int:
    """Some leaves go to other parents of the same height and take their samples along; how many did.

    Inner nodes that had not met these samples get them; the root's store stays what it was, in another order. A leaf
    stays whose parent has no other child.
    """
    leaves = h.tree.leaves
    count = max(1, round(h.settings.migrate * len(leaves)))
    draw = Streams(h.schedule.seed, torch.tensor([NOBODY]), h.round)
    order = draw.order(torch.tensor([len(leaves)]), len(leaves), 0)[0]
    words = draw.words(count, Purpose.METHOD)[0].tolist()
    moved = 0
    for which, word in zip(order[:count].tolist(), words, strict=True):
        leaf = leaves[which]
        before = h.tree.parents[leaf]
        places = [v for v in h.tree.of_height(h.tree.heights[before]) if v != before]
        if places and len(h.tree.children[before]) > 1:
            move(h, leaf, places[word % len(places)])
            moved += 1
    return moved


def move(h: Hierarchy, leaf: int, parent: int) -> None:
    """A leaf goes to another parent; its embeddings are sent to those above it that have not had them."""
    knew = h.tree.above(leaf)
    h.tree = h.tree.moved(leaf, parent)
    store, v = h.stores[leaf], leaf
    while h.tree.parents[v] not in knew:
        _cross(h, v, h.embeddings[store], h.labels[store])
        v = h.tree.parents[v]
    h.stores = stores(h.tree, h.holdings.owned)
