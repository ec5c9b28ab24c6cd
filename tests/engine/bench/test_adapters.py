"""An engine with adapters is timed only when it says what the model with them says."""

import pytest
import torch

from anabranch import LLM
from anabranch.adapters.rank_lora import RankLoraSettings
from anabranch.bench.adapters import AdaptedPeer, check_against_the_model, measure_adapters, write_adapters
from anabranch.bench.engine import TINY, save_random_model
from anabranch.bench.timing import Roofs

ROOFS = Roofs(read=lambda: 1e9, flops=1e12)


def test_all_contenders_take_turns():
    samples = measure_adapters(TINY, ROOFS, batch=3, adapters=2, new_tokens=2, repeats=2)
    names = ["no adapters", "one LoRA 16", "2 LoRA 16, mixed", "2 SMoRA 8 of 64, mixed"]
    assert [sample.contender for sample in samples] == names
    assert all(len(sample.seconds) == 2 and min(sample.seconds) > 0 and sample.tokens == 3 for sample in samples)


def test_an_adapter_that_says_something_else_is_noticed(tmp_path):
    save_random_model(TINY, tmp_path / "model")
    folders = write_adapters(tmp_path / "model", tmp_path, {"LoRA": RankLoraSettings(ranks=4, alpha=400.0)}, 2)
    llm = LLM(tmp_path / "model", adapters=folders)
    peer = AdaptedPeer("both", llm, list(folders))
    check_against_the_model(peer, tmp_path / "model", folders["LoRA 0"], [5, 17, 40])
    with pytest.raises(ValueError, match="both: logarithms are"):
        check_against_the_model(peer, tmp_path / "model", folders["LoRA 1"], [5, 17, 40])
    assert not torch.equal(peer.logprobs([5]), AdaptedPeer("none", llm, [None]).logprobs([5]))
