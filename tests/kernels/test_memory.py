"""Asking for huge pages changes where a tensor lies at most, never what it holds, for any size and place."""

import pytest
import torch

from anabranch_kernels.memory import HUGE_PAGE, prefer_huge_pages


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_any_size_keeps_what_it_holds(size):
    tensor = torch.arange(size, dtype=torch.uint8)
    kept = tensor.clone()
    assert prefer_huge_pages(tensor) is tensor
    assert torch.equal(tensor, kept)


def test_a_view_stands_for_its_whole_storage():
    tensor = torch.ones(2 * HUGE_PAGE)
    prefer_huge_pages(tensor[5:7])
    assert torch.equal(tensor, torch.ones_like(tensor))


def test_tensors_without_memory_are_left_alone():
    tensor = torch.empty(HUGE_PAGE, device="meta")
    assert prefer_huge_pages(tensor) is tensor
