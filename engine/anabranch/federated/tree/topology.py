"""A tree of nodes: the cloud at the root, edges below it, devices as leaves; or any other depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

ROOT, NOBODY = 0, -1


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Nodes 0 .. V - 1; node 0 is the root, and at least one other is below it.

    parents   of each node; that of the root is -1
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        V = len(self.parents)
        if V < 2 or self.parents[ROOT] != NOBODY:
            raise ValueError(f"a tree has node 0 as its root, of parent -1, and others; got parents {self.parents}")
        for v, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < V:
                raise ValueError(f"node {v} has parent {parent}, but the nodes are 0 .. {V - 1}")
        for v in range(1, V):
            if ROOT not in self.above(v):
                raise ValueError(f"the parents of node {v} go round in a circle, got parents {self.parents}")

    def above(self, node: int) -> list[int]:
        """The nodes between this one and the root, nearest first, and the root; in a circle, each once."""
        chain: list[int] = []
        while node != ROOT and self.parents[node] not in chain:
            node = self.parents[node]
            chain.append(node)
        return chain

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each node, in the order of their numbers."""
        found: list[list[int]] = [[] for _ in self.parents]
        for v, parent in enumerate(self.parents[1:], 1):
            found[parent].append(v)
        return found

    @cached_property
    def post_order(self) -> list[int]:
        """Every node after its children, siblings in the order of their numbers; the root is last."""
        order, waiting = [], [ROOT]
        while waiting:  # parents before children, the last child first: the other way round
            v = waiting.pop()
            order.append(v)
            waiting += self.children[v]
        return order[::-1]

    @cached_property
    def heights(self) -> list[int]:
        """Of each node the longest way down to a leaf: 0 for leaves."""
        found = [0] * len(self.parents)
        for v in self.post_order:
            found[v] = max((1 + found[child] for child in self.children[v]), default=0)
        return found

    @cached_property
    def leaves(self) -> list[int]:
        """Their numbers, rising."""
        return [v for v, below in enumerate(self.children) if not below]

    def of_height(self, height: int) -> list[int]:
        """Nodes of a height, rising."""
        return [v for v, of_node in enumerate(self.heights) if of_node == height]

    def moved(self, leaf: int, parent: int) -> "Tree":
        """The tree after a leaf went to another inner node. Heights stay: inner nodes keep at least one child."""
        if leaf not in self.leaves:
            raise ValueError(f"only leaves move, which are {self.leaves}; got node {leaf}")
        if not 0 <= parent < len(self.parents) or parent in self.leaves:
            raise ValueError(f"leaf {leaf} cannot go to node {parent}, which is no inner node")
        if parent != self.parents[leaf] and len(self.children[self.parents[leaf]]) == 1:
            raise ValueError(f"leaf {leaf} is the only child of node {self.parents[leaf]}, which it cannot leave alone")
        return Tree(parents=(*self.parents[:leaf], parent, *self.parents[leaf + 1 :]))


def regular(tiers: Sequence[int]) -> Tree:
    """The tree of so many nodes in each tier below the root, from the top; children of a tier are spread evenly.

    (12,) is a server and its clients, (3, 12) three edges of four leaves each.
    """
    counts = [1, *tiers]
    if len(counts) < 2 or any(below < above for above, below in pairwise(counts)):
        raise ValueError(
            f"a tree is written as the nodes of each tier below the root, none fewer than above; got {list(tiers)}"
        )
    parents, first = [NOBODY], 0
    for above, below in pairwise(counts):
        parents += [first + i * above // below for i in range(below)]
        first += above
    return Tree(parents=tuple(parents))
