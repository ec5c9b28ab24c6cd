"""Batches: each client goes through its own samples as if it were alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated.packed import epoch, pack, subset
from anabranch.federated.streams import Streams


def batches(counts, clients, *, size, drop_last, number=1):
    M = sum(counts)
    x = torch.arange(M, dtype=torch.float32)[:, None]
    data = pack(x, torch.arange(M), list(torch.arange(M).split(list(counts))))
    return data, list(epoch(data, Streams(5, torch.tensor(clients), 2), number, size=size, drop_last=drop_last))


@given(st.lists(st.integers(1, 11), min_size=1, max_size=5), st.integers(1, 6), st.booleans())
def test_every_client_is_as_if_alone(counts, size, drop_last):
    _, together = batches(counts, list(range(len(counts))), size=size, drop_last=drop_last)
    for i, count in enumerate(counts):
        _, alone = batches([count], [i], size=size, drop_last=drop_last)
        mine = [batch for batch in together if bool(batch.live[i])]
        assert len(mine) == len(alone)
        for ours, single in zip(mine, alone, strict=True):
            real = ours.real[i]
            assert torch.equal(ours.which[i][real], single.which[0][single.real[0]])
            assert ours.number == single.number
            torch.testing.assert_close(ours.weight[i].sum(), torch.tensor(1.0))


@given(st.lists(st.integers(1, 11), min_size=1, max_size=5), st.integers(1, 6))
def test_an_epoch_shows_every_sample_once(counts, size):
    data, all_batches = batches(counts, list(range(len(counts))), size=size, drop_last=False)
    for i, count in enumerate(counts):
        seen = torch.cat([batch.which[i][batch.real[i]] for batch in all_batches])
        assert sorted(seen.tolist()) == list(range(count))
        shown = torch.cat([batch.y[i][batch.real[i]] for batch in all_batches])
        assert torch.equal(shown, data.y[i][seen])
        assert torch.equal(torch.cat([batch.x[i][batch.real[i]] for batch in all_batches])[:, 0], shown.float())


def test_what_does_not_fill_a_batch_is_left_out_but_never_everything():
    _, steps = batches([7, 2], [0, 1], size=3, drop_last=True)
    assert [batch.real.sum(1).tolist() for batch in steps] == [[3, 2], [3, 0]]
    assert [batch.live.tolist() for batch in steps] == [[True, True], [True, False]]


def test_epochs_differ_in_their_order_and_their_numbers():
    _, first = batches([9], [0], size=3, drop_last=False, number=0)
    _, second = batches([9], [0], size=3, drop_last=False, number=1)
    assert not torch.equal(first[0].which, second[0].which)
    assert not {batch.number for batch in first} & {batch.number for batch in second}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6).filter(any), min_size=1, max_size=5))
def test_a_subset_is_what_clients_with_these_samples_alone_would_hold(chosen):
    x, y = torch.arange(100.0).view(50, 2), torch.arange(50)
    owned = list(torch.arange(sum(map(len, chosen))).split([len(row) for row in chosen]))
    data = pack(x, y, owned)
    mask = torch.zeros_like(data.y, dtype=torch.bool)
    for row, mine in zip(mask, chosen, strict=True):
        row[: len(mine)] = torch.tensor(mine)
    mine = [own[torch.tensor(row)] for own, row in zip(owned, chosen, strict=True)]
    for found, expected in zip(subset(data, mask), pack(x, y, mine), strict=True):
        assert torch.equal(found, expected)


def test_every_sample_is_written_once_and_nothing_else():
    owned = [torch.arange(0, 3), torch.arange(3, 10), torch.arange(10, 11)]
    data = pack(torch.arange(11.0)[:, None], torch.arange(11), owned)
    written = torch.zeros(3, 7, dtype=torch.int64)
    for batch in epoch(data, Streams(1, torch.arange(3), 0), 0, size=2, drop_last=False):
        torch.testing.assert_close(batch.take(data.y), batch.y)
        batch.put(written, batch.take(written) + 1 + batch.y)
    assert torch.equal(written, torch.where(data.real, 1 + data.y, 0))


def test_samples_that_are_dropped_are_not_written():
    data = pack(torch.zeros(9, 1), torch.arange(9), [torch.arange(0, 4), torch.arange(4, 9)])
    written = torch.zeros(2, 5, 3)
    for batch in epoch(data, Streams(1, torch.arange(2), 0), 0, size=3, drop_last=True):
        batch.put(written, torch.ones(*batch.y.shape, 3))
    assert written.sum((1, 2)).tolist() == [9.0, 9.0]


def test_turns_are_written_one_by_one():
    data = pack(torch.zeros(7, 1), torch.arange(7), [torch.arange(0, 3), torch.arange(3, 7)])
    written = torch.zeros(2, 4, 2, dtype=torch.int64)
    for number in range(3):
        for batch in epoch(data, Streams(1, torch.arange(2), 0), number, size=2, drop_last=False):
            batch.put(written, batch.y + 10 * number, torch.full_like(batch.y, number % 2))
    expected = torch.stack([data.y + 20, data.y + 10], -1)
    assert torch.equal(written, torch.where(data.real[..., None], expected, 0))
