"""torch's threads, for the length of a block."""

import pytest
import torch

from anabranch.common.threads import torch_threads


def test_threads_are_as_before_behind_the_block_whatever_happens_in_it():
    before = torch.get_num_threads()
    with torch_threads(3):
        assert torch.get_num_threads() == 3
        with torch_threads(None):
            assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), torch_threads(5):
        raise KeyError
    assert torch.get_num_threads() == before
