"""Every sample has one owner and every client enough, whatever the classes and however many clients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated.partition import Partition, deal_out, parse_partition


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def tasks(draw):
    """Labels, clients, a minimum that there is enough for, and a seed."""
    y = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=4, max_size=120)))
    clients = draw(st.integers(1, min(12, len(y))))
    return y, clients, draw(st.integers(1, len(y) // clients)), draw(st.integers(0, 99))


@given(tasks(), st.sampled_from(["iid", "dirichlet:0.01", "dirichlet:0.5", "dirichlet:100"]))
def test_parts_are_disjoint_cover_all_and_have_the_minimum(task, text):
    y, clients, minimum, seed = task
    owned = deal_out(parse_partition(text, minimum=minimum), y, clients, generator(seed))
    assert len(owned) == clients
    assert min(map(len, owned)) >= minimum
    assert torch.cat(list(owned)).sort().values.tolist() == list(range(len(y)))
    again = deal_out(parse_partition(text, minimum=minimum), y, clients, generator(seed))
    assert all(map(torch.equal, owned, again))


@given(tasks())
def test_iid_clients_differ_by_one_sample(task):
    y, clients, _, seed = task
    counts = [len(one) for one in deal_out(Partition(), y, clients, generator(seed))]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("shards", "clients"), [(1, 10), (2, 20), (5, 7)])
def test_shards_hold_few_classes(shards, clients):
    y = torch.arange(10).repeat(70)[torch.randperm(700, generator=generator())]
    owned = deal_out(parse_partition(f"shards:{shards}"), y, clients, generator(1))
    assert torch.cat(list(owned)).sort().values.tolist() == list(range(700))
    crossed = 1 + -(-700 // (shards * clients)) // 70  # classes that one shard may touch beyond its first
    assert max(len(y[one].unique()) for one in owned) <= shards * (1 + crossed)
    counts = [len(one) for one in owned]
    assert max(counts) - min(counts) <= shards


def test_a_small_alpha_makes_clients_unlike():
    y = torch.arange(10).repeat(200)

    def classes_held(alpha):
        owned = deal_out(parse_partition(f"dirichlet:{alpha}"), y, 20, generator(3))
        return sum(len(y[one].unique()) for one in owned) / 20

    assert classes_held(0.05) < 4 < 9.5 < classes_held(100)


def test_a_client_with_its_share_gets_none_of_further_classes():
    y = torch.arange(10).repeat(100)
    for seed in range(20):
        counts = [len(one) for one in deal_out(parse_partition("dirichlet:0.3"), y, 10, generator(seed))]
        assert max(counts) < 100 + 100  # M / K, and a class at most


def test_where_no_draw_gives_all_enough_the_largest_hand_over():
    y = torch.zeros(40, dtype=torch.int64)  # one class and a tiny alpha: one client would have all
    counts = [len(one) for one in deal_out(parse_partition("dirichlet:1e-9", minimum=10), y, 4, generator())]
    assert counts == [10, 10, 10, 10]


def test_owners_are_those_of_the_data():
    owners = torch.tensor([2, 0, 1, 0, 2])
    owned = deal_out(parse_partition("owners"), torch.zeros(5).long(), 3, generator(), owners=owners)
    assert [one.tolist() for one in owned] == [[1, 3], [2], [0, 4]]
    with pytest.raises(ValueError, match="belong to 3 clients, got clients 4"):
        deal_out(parse_partition("owners"), torch.zeros(5).long(), 4, generator(), owners=owners)
    with pytest.raises(ValueError, match="do not say"):
        deal_out(parse_partition("owners"), torch.zeros(5).long(), 4, generator())


def test_resampled_clients_may_outnumber_the_data():
    owned = deal_out(parse_partition("resample:7"), torch.arange(10), 100, generator())
    assert len(owned) == 100
    assert {len(one) for one in owned} == {7}
    assert len(torch.cat(list(owned)).unique()) == 10


@pytest.mark.parametrize("text", ["zipf", "iid:2", "shards", "shards:1.5", "dirichlet:0", "dirichlet:x", "owners:3"])
def test_what_is_no_partition_is_refused(text):
    with pytest.raises(ValueError, match="partition"):
        parse_partition(text)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="5 samples are too few for 2 clients with at least 3"):
        deal_out(parse_partition("iid", minimum=3), torch.zeros(5).long(), 2, generator())
