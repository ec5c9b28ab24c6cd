"""Real process groups over loopback; the ranks are threads of this process."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anabranch.serve.group import ProcessGroup, place

SIZE = 3


@pytest.fixture
def on_all(tmp_path):
    """`on_all(work)`: what `work(group)` returns on each of three connected ranks."""
    groups = [ProcessGroup(rank, SIZE) for rank in range(SIZE)]
    with ThreadPoolExecutor(SIZE) as threads:
        list(threads.map(lambda group: group.connect(tmp_path / "ranks", torch.device("cpu")), groups))
        yield lambda work: list(threads.map(work, groups))
    for group in groups:
        group.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_reaches_every_rank_in_place(on_all, dtype):
    def work(group):
        with torch.inference_mode():  # as an engine's step runs
            x = torch.full((2, 5), 1.5 + group.rank, dtype=dtype)
            return x, group.all_reduce(x)

    for x, total in on_all(work):
        assert total is x
        assert torch.equal(total, torch.full((2, 5), 7.5, dtype=dtype))  # every partial sum is exact in all three


@pytest.mark.parametrize("total", [9, 10, 11, 3])
def test_columns_are_gathered_in_order_on_rank_0(on_all, total):
    whole = torch.arange(2.0 * total).reshape(2, total)

    def work(group):
        return group.gather(whole[:, total * group.rank // SIZE : total * (group.rank + 1) // SIZE], total)

    first, *others = on_all(work)
    assert torch.equal(first, whole)
    assert [x.shape[1] for x in others] == [total * (r + 1) // SIZE - total * r // SIZE for r in (1, 2)]


def test_one_that_leaves_fails_the_exchange_of_the_others(on_all):
    def work(group):
        if group.rank == 1:
            group.close()
            return None
        try:
            return group.all_reduce(torch.ones(3))
        except RuntimeError as error:
            return error

    outcomes = on_all(work)
    assert isinstance(outcomes[0], RuntimeError)
    assert isinstance(outcomes[2], RuntimeError)


def test_a_group_that_was_aborted_does_not_settle(on_all):
    def work(group):
        group.settle()
        group.abort()
        with pytest.raises(RuntimeError, match="an exchange was cut short"):
            group.settle()

    on_all(work)


def test_ranks_take_gpus_in_order():
    assert place(torch.device("cuda"), 2) == torch.device("cuda", 2)
    assert place(torch.device("cpu"), 2) == torch.device("cpu")
