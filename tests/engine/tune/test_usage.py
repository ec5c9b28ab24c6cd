"""How evenly blocks are picked, since the last entry and since the last whole one."""

import json
from math import sqrt

import pytest
import torch
from torch import nn

from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.tune.usage import Usage


@pytest.fixture
def layers():
    settings = RankLoraSettings(ranks=4, chosen=1)
    return {name: RankLora(3, 2, settings) for name in ("a", "b")}


def test_spread_is_that_of_the_counts_since_the_last_entry(layers):
    usage = Usage(layers)
    usage.add({"a": torch.tensor([5, 5, 5, 5]), "b": torch.tensor([8, 0, 0, 0])})
    assert usage.entry(whole=False) == {"cv": round(sqrt(3) / 2, 4), "unused": 0.375}
    usage.add({"b": torch.tensor([0, 8, 8, 8]), "a": torch.tensor([1, 1, 1, 1])})
    said = usage.entry(whole=True)
    assert said["cv"] == pytest.approx(1 / sqrt(3) / 2, abs=1e-4)
    assert said["usage"] == {
        "a": {"counts": [6, 6, 6, 6], "cv": 0.0, "unused": 0.0},
        "b": {"counts": [8, 8, 8, 8], "cv": 0.0, "unused": 0.0},
    }
    assert usage.entry(whole=True)["usage"]["a"] == {"counts": [0, 0, 0, 0], "cv": 0.0, "unused": 1.0}
    json.dumps(said)


def test_counts_are_those_that_balancing_saw(layers):
    usage = Usage(layers)
    for layer in layers.values():
        layer.train()(torch.randn(7, 3))
    usage.add({name: layer.rebalance() for name, layer in layers.items()})
    said = usage.entry(whole=True)["usage"]
    assert [sum(layer["counts"]) for layer in said.values()] == [7, 7]
    assert not any(layer.counts.any() for layer in layers.values())


def test_a_checkpoint_holds_what_is_not_logged_yet(layers):
    usage, again = Usage(layers), Usage(layers)
    usage.add({"a": torch.tensor([1, 2, 3, 4]), "b": torch.tensor([4, 3, 2, 1])})
    usage.entry(whole=False)
    usage.add({"a": torch.tensor([1, 0, 0, 0]), "b": torch.tensor([4, 0, 0, 0])})
    again.load_state_dict(nn.ModuleList([usage])[0].state_dict())
    assert again.entry(whole=True) == usage.entry(whole=True)
