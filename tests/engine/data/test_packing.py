"""Packed rows: every token of every example once an epoch, nothing across examples, the same from the same seed."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.data.instructions import Example
from anabranch.data.packing import IGNORED, Packs


def example(first, length, learnt_from=1):
    return Example([first + k for k in range(length)], [k >= learnt_from for k in range(length)])


def pieces(batch):
    """(inputs, targets, positions) of every segment that is no padding."""
    for row, lengths in enumerate(batch.segments):
        at = 0
        for length in lengths:
            part = slice(at, at + length)
            found = batch.inputs[row, part], batch.targets[row, part], batch.positions[row, part]
            if (found[1] != IGNORED).any():
                yield tuple(x.tolist() for x in found)
            at += length
        assert at == batch.inputs.shape[1]


@given(st.lists(st.integers(2, 17), min_size=1, max_size=12), st.integers(0, 3))
def test_an_epoch_holds_every_example_once_and_whole(lengths, seed):
    examples = [example(100 * index, length) for index, length in enumerate(lengths)]
    packs = Packs(examples, context=16, batch=1, seed=seed)
    found = [piece for step in range(packs.rows(0)) for piece in pieces(packs.at(step))]
    wanted = [(one.ids[:-1], one.ids[1:], list(range(len(one.ids) - 1))) for one in examples]
    assert sorted(found) == sorted(wanted)
    assert packs.cut == 0


def test_to_measure_every_example_comes_once():
    packs = Packs([example(100 * index, 12) for index in range(5)], context=16, batch=2, seed=0)
    assert sorted(inputs[0] for batch in packs.once() for inputs, _, _ in pieces(batch)) == [0, 100, 200, 300, 400]


def test_only_what_is_to_be_learnt_is_a_target():
    packs = Packs([example(5, 6, learnt_from=4)], context=8, batch=1, seed=0)
    assert packs.at(0).targets.tolist() == [[IGNORED, IGNORED, IGNORED, 9, 10, IGNORED, IGNORED, IGNORED]]


def test_epochs_follow_each_other_in_new_orders():
    examples = [example(100 * index, 7) for index in range(6)]  # two fit a row
    packs = Packs(examples, context=12, batch=2, seed=0)
    rows = [row for step in range(6) for row in packs.at(step).inputs.tolist()]
    for epoch in range(4):
        tokens = Counter(token for row in rows[3 * epoch : 3 * epoch + 3] for token in row)
        assert set(tokens.values()) == {1}
    assert rows[:3] != rows[3:6]
    again = Packs(examples, context=12, batch=2, seed=0)
    assert torch.equal(again.at(5).inputs, packs.at(5).inputs)
    assert not torch.equal(Packs(examples, context=12, batch=2, seed=1).at(0).inputs, packs.at(0).inputs)


def test_long_examples_are_cut_and_counted():
    packs = Packs([example(0, 40), example(100, 5), example(200, 20, learnt_from=15)], context=8, batch=2, seed=0)
    assert (packs.examples, packs.cut, packs.dropped) == (2, 1, 1)
    assert {len(piece[0]) for piece in pieces(packs.at(0))} == {8, 4}


def test_what_leaves_nothing_to_learn_is_refused():
    for examples in ([], [example(0, 40, learnt_from=30)]):
        with pytest.raises(ValueError, match="no example has anything to learn"):
            Packs(examples, context=8, batch=1, seed=0)
    with pytest.raises(ValueError, match="need context >= 2"):
        Packs([example(0, 4)], context=1, batch=1, seed=0)


def test_rows_are_filled_as_by_a_search_of_all_open_rows():
    """Best fit: the fullest row that has room, the first of those."""
    lengths = torch.randint(2, 40, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = Packs([example(0, length) for length in lengths], context=48, batch=1, seed=3)
    room, rows = [], []
    for index in torch.randperm(300, generator=torch.Generator().manual_seed(3 * 1_000_003)).tolist():
        need = lengths[index] - 1
        best = min((row for row in range(len(rows)) if room[row] >= need), key=room.__getitem__, default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            room.append(48)
        rows[best].append(need)
        room[best] -= need
    batches = [packs.at(step) for step in range(packs.rows(0))]
    assert [batch.segments[0] for batch in batches] == [
        [*row, left] if left else row for row, left in zip(rows, room, strict=True)
    ]
    assert sum(batch.examples for batch in batches) == 300
    assert sum(int(batch.used.sum()) for batch in batches) == sum(lengths) - 300


def test_the_same_examples_have_the_same_digest():
    def digest(*examples, context=16):
        return Packs(examples, context=context, batch=1, seed=0).digest

    one, other = example(0, 6), example(9, 6)
    assert digest(one, other) == digest(one, other)
    others = [digest(other, one), digest(one), digest(one, example(9, 6, learnt_from=2)), digest(one, other, context=3)]
    assert digest(one, other) not in others
