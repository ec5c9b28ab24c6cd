"""Streams: Philox as published, independent of who else draws."""

import numpy as np
import pytest
import torch

from anabranch.federated.streams import Purpose, Streams, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert philox(np.array(counter, np.uint64), np.array(key, np.uint64)).tolist() == words


def test_a_stream_does_not_depend_on_its_company():
    together = Streams(7, torch.tensor([3, 1, 8]), 5)
    for i, client in enumerate((3, 1, 8)):
        alone = Streams(7, torch.tensor([client]), 5)
        for draw in ("words", "uniform", "normal"):
            mine = getattr(alone, draw)(9, Purpose.MIX, 2)[0]
            assert torch.equal(getattr(together, draw)(9, Purpose.MIX, 2)[i], mine)


@pytest.mark.parametrize("draw", ["words", "uniform", "normal"])
def test_a_longer_draw_begins_with_the_shorter(draw):
    longer = getattr(Streams(7, torch.tensor([3, 1]), 5), draw)(33, Purpose.MIX, 2)
    for count in (0, 1, 2, 5, 32):  # clients of few samples draw less alone than in a group
        assert torch.equal(getattr(Streams(7, torch.tensor([3, 1]), 5), draw)(count, Purpose.MIX, 2), longer[:, :count])


def test_seed_client_round_purpose_and_part_each_make_another_stream():
    def first(seed=1, client=2, round=3, purpose=Purpose.MIX, part=4):
        return tuple(Streams(seed, torch.tensor([client]), round).words(4, purpose, part)[0].tolist())

    drawn = {first(), first(seed=2), first(client=3), first(round=4), first(purpose=Purpose.METHOD), first(part=5)}
    assert len(drawn) == 6


def test_distributions():
    streams = Streams(0, torch.arange(40), 0)
    uniform, normal = streams.uniform(5000, Purpose.MIX), streams.normal(5000, Purpose.MIX, 1)
    # 200,000 draws: means are within 5 standard errors
    assert abs(float(uniform.mean()) - 0.5) < 5 * 0.2887 / 200_000**0.5
    assert abs(float(normal.mean())) < 5 / 200_000**0.5
    assert abs(float(normal.std()) - 1) < 5 / (2 * 200_000) ** 0.5
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert np.isfinite(normal.numpy()).all()


def test_an_order_is_a_permutation_of_a_clients_own_samples():
    counts = torch.tensor([5, 8, 1])
    order = Streams(3, torch.tensor([0, 1, 2]), 0).order(counts, 8, 0)
    for row, count in zip(order.tolist(), counts.tolist(), strict=True):
        assert sorted(row[:count]) == list(range(count))
        assert sorted(row) == list(range(8))
    alone = Streams(3, torch.tensor([0]), 0).order(torch.tensor([5]), 5, 0)
    assert alone[0].tolist() == order[0, :5].tolist()  # whatever the longest of the group
