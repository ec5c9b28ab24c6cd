"""The layer of routed ranks: what is exact about it, and how its balance moves."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.adapters.rank_lora import RankLora, RankLoraSettings


def layer(**settings):
    made = RankLora(12, 10, RankLoraSettings(**settings), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b.normal_(generator=torch.Generator().manual_seed(1))
    return made


def inputs(*shape):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chosen", [None, 2])
def test_it_adds_exactly_nothing_before_training(chosen):
    fresh = RankLora(12, 10, RankLoraSettings(ranks=8, chosen=chosen))
    assert not fresh(inputs(3, 4)).any()


def test_plain_lora_is_its_delta():
    lora = layer(ranks=4, alpha=8.0)
    assert_close(lora(inputs(2, 3)), inputs(2, 3) @ lora.delta().T)
    assert_close(lora.delta(), 8 / 4 * lora.b.T @ lora.a)


def test_gates_that_depend_on_the_token_cannot_be_merged():
    with pytest.raises(ValueError, match="cannot be merged"):
        layer(ranks=4, chosen=2).delta()


def test_balance_moves_the_bias_towards_equal_counts():
    smora = layer(ranks=4, chosen=1, balance=0.25)
    smora.counts += torch.tensor([9, 1, 1, 1])
    smora.rebalance()
    assert smora.bias.tolist() == [-0.25, 0.25, 0.25, 0.25]
    assert not smora.counts.any()
    smora.counts += 5
    smora.rebalance()
    assert smora.bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_only_training_counts_and_padding_never_does():
    smora = layer(ranks=6, chosen=2)
    smora.eval()
    smora(inputs(5))
    assert not smora.counts.any()
    smora.train()
    out = smora(inputs(5), torch.tensor([0, 0, -1, 0, -1], dtype=torch.int32))
    assert smora.counts.sum() == 3 * 2
    assert not out[[2, 4]].any()


def test_the_bias_is_stored_without_being_trained():
    smora = layer(ranks=6, chosen=2)
    assert "bias" in smora.state_dict()
    assert "bias" not in dict(smora.named_parameters())
    assert smora.to(torch.bfloat16).bias.dtype == torch.float32
    assert smora(inputs(2).bfloat16()).dtype == torch.bfloat16


def test_unbalanced_routing_evens_out():
    """All tokens look alike, so without balance few ranks ever see one; with it every rank gets its share."""
    x = inputs(1).expand(64, 12) + 0.3 * torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    for balance, fewest in ((0.0, 0), (1e-2, 8)):
        smora = layer(ranks=16, chosen=2, balance=balance)
        for _ in range(200):
            smora.counts.zero_()
            smora(x)
            counts = smora.counts.clone()
            smora.rebalance()
        used = int((counts > 0).sum())
        assert (used >= fewest) if balance else (used < 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 6, "block": 4}, "multiple of block"),
        ({"ranks": 6, "block": 2, "chosen": 4}, "chosen <= rows"),
        ({"ranks": 4, "chosen": 2, "gate": "top"}, "gate must be one of"),
        ({"ranks": 4, "balance": -1.0}, "balance must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RankLoraSettings(**settings)
