"""Trees are what their parents say, whatever the numbers of their nodes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated.tree.topology import ROOT, Tree, regular


@st.composite
def trees(draw):
    """Every node's parent has been drawn before it; then all but the root are numbered anew."""
    V = draw(st.integers(2, 12))
    parents = [-1, *(draw(st.integers(0, v - 1)) for v in range(1, V))]
    numbers = [0, *draw(st.permutations(range(1, V)))]
    renumbered = [-1] * V
    for v in range(1, V):
        renumbered[numbers[v]] = numbers[parents[v]]
    return Tree(parents=tuple(renumbered))


@given(trees())
def test_children_come_before_their_parents_and_siblings_in_order(tree):
    order = tree.post_order
    assert sorted(order) == list(range(len(tree.parents)))
    assert order[-1] == ROOT
    place = {v: i for i, v in enumerate(order)}
    for v, below in enumerate(tree.children):
        assert below == [child for child, parent in enumerate(tree.parents) if parent == v]
        assert [place[child] for child in below] == sorted(place[child] for child in below)
        assert all(place[child] < place[v] for child in below)


@given(trees())
def test_heights_are_the_longest_ways_down(tree):
    def longest(v):
        return max((1 + longest(child) for child in tree.children[v]), default=0)

    assert tree.heights == [longest(v) for v in range(len(tree.parents))]
    assert tree.leaves == tree.of_height(0)
    assert all(tree.above(v)[-1] == ROOT for v in range(1, len(tree.parents)))


@given(trees(), st.data())
def test_a_move_changes_one_parent_and_no_height(tree, data):
    movable = [v for v in tree.leaves if len(tree.children[tree.parents[v]]) > 1]
    if not movable:
        return
    leaf = data.draw(st.sampled_from(movable))
    parent = data.draw(st.sampled_from([v for v in range(len(tree.parents)) if tree.children[v]]))
    after = tree.moved(leaf, parent)
    assert after.parents[leaf] == parent
    assert [v for v, (a, b) in enumerate(zip(after.parents, tree.parents, strict=True)) if a != b] in ([], [leaf])
    assert after.heights == tree.heights


def test_regular_trees_spread_children_evenly():
    assert regular((3,)).parents == (-1, 0, 0, 0)
    assert regular((2, 5)).parents == (-1, 0, 0, 1, 1, 1, 2, 2)
    assert regular((1, 2, 2)).heights == [3, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("parents", "said"),
    [
        ((-1,), "others"),
        ((0, 0), "node 0 as its root"),
        ((-1, 2, 1), "round in a circle"),
        ((-1, 1), "round in a circle"),
        ((-1, 0, 7), "node 2 has parent 7, but the nodes are 0 .. 2"),
        ((-1, -1), "node 1 has parent -1"),
    ],
)
def test_what_is_no_tree_is_refused(parents, said):
    with pytest.raises(ValueError, match=said):
        Tree(parents=parents)


def test_moves_that_cannot_be_are_refused():
    tree = regular((2, 3))  # node 1 has leaves 3 and 4, node 2 has leaf 5
    refused = ((1, 2, "only leaves move"), (4, 3, "no inner node"), (4, 9, "no inner node"), (5, 1, "only child"))
    for leaf, parent, said in refused:
        with pytest.raises(ValueError, match=said):
            tree.moved(leaf, parent)
    for tiers in ((), (0,), (3, 2)):
        with pytest.raises(ValueError, match="nodes of each tier"):
            regular(tiers)
