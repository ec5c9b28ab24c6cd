"""Work in several threads is the work of one."""

import threading

import pytest
import torch

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure import threads


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_results_are_in_the_order_of_the_items(torch_threads, count):
    torch_threads(count)
    together = threading.Barrier(count)

    def work(item):
        if item < count:  # the first item of each thread: all threads are there at once
            together.wait(timeout=60)
        return item * item

    items = range(7)
    assert threads.each(work, items, threads.WORTH_A_THREAD) == [item * item for item in items]
    assert threads.each(work, [], threads.WORTH_A_THREAD) == []


def test_little_work_stays_here(torch_threads):
    torch_threads(2)
    here = {threading.get_ident()}
    assert set(threads.each(lambda item: threading.get_ident(), range(7), threads.WORTH_A_THREAD // 7)) == here


def test_an_error_in_any_thread_is_raised(torch_threads):
    torch_threads(2)
    for bad in range(4):
        with pytest.raises(ZeroDivisionError):
            threads.each(lambda item, bad=bad: 1 / (item - bad), range(4), threads.WORTH_A_THREAD)


def test_a_round_in_two_threads_says_the_same(session, torch_threads, monkeypatch):
    def record(count, worth):
        torch_threads(count)
        monkeypatch.setattr(threads, "WORTH_A_THREAD", worth)
        said = []
        made = session(mode="mask")

        def wire(client, to_server, message):
            said.append(bytes(message))
            gone = client == 8 and to_server and isinstance(made.message(message), m.Sum)
            return None if gone else message

        made.check(made.round(wire=wire))
        return said

    assert record(2, 1) == record(1, 1 << 20)
