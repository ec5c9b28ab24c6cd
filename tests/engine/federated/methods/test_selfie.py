"""SELFIE: plain before, chosen and refurbished samples afterwards, beside a loop over samples."""

import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.methods.selfie import SELFIE
from anabranch.federated.rounds import run_round


@pytest.mark.parametrize("method", [SELFIE(warm_up=99), SELFIE(warm_up=0, rate=0.0, threshold=-1.0)])
def test_before_its_time_or_without_doubts_it_is_fedavg(trained, method, by_steps):
    assert torch.equal(trained(method), trained(by_steps))


@pytest.mark.parametrize("method", [SELFIE(warm_up=1, history=3), SELFIE(warm_up=1, history=2, rate=0.5)])
def test_alone_and_together(same_alone_and_together, method):
    same_alone_and_together(method)


@pytest.mark.parametrize(("rate", "threshold"), [(0.2, 0.05), (0.6, 0.6), (0.6, 1.0)])
def test_a_step_is_one_on_the_chosen_samples(found_small, rate, threshold):
    """Batches hold all samples of a client, so that one round is one step."""
    options = {"batch": 32, "epochs": 1, "lr": 0.3, "momentum": 0.0, "weight_decay": 0.0}
    federation = found_small(SELFIE(rate=rate, history=3, threshold=threshold, warm_up=4), **options)
    network, held = federation.network, federation.holdings
    said = {(k, i): [] for k, owned in enumerate(held.owned) for i in range(len(owned))}
    refurbished = 0
    for round in range(8):
        model = federation.server["model"][0]
        total = torch.zeros_like(model)
        for k, owned in enumerate(held.owned):
            row = model.clone().requires_grad_()
            views = network.layout.views(row[None])
            hidden = F.relu(held.x[owned] @ views["0.weight"][0] + views["0.bias"][0])
            z = hidden @ views["1.weight"][0] + views["1.bias"][0]
            y = held.y[owned].clone()
            losses = F.cross_entropy(z, y, reduction="none").tolist()
            chosen = set(range(len(owned)))
            for i, says in enumerate(z.argmax(1).tolist()):
                said[k, i].append(says)
            if round >= 4:
                kept = math.ceil(round_off((1 - rate) * len(owned)))
                chosen = set(sorted(chosen, key=losses.__getitem__)[:kept])
                for i in range(len(owned)):
                    last = said[k, i][-3:]
                    shares = [last.count(c) / 3 for c in set(last)]
                    if -sum(s * math.log(s) for s in shares) / math.log(3) <= threshold:
                        refurbished += int(y[i]) != max(range(3), key=last.count)
                        y[i] = max(range(3), key=last.count)
                        chosen.add(i)
            index = sorted(chosen)
            loss = F.cross_entropy(z[index], y[index])
            total += len(owned) * (row.detach() - 0.3 * torch.autograd.grad(loss, row)[0])
        run_round(federation)
        torch.testing.assert_close(federation.server["model"][0], total / len(held.y), atol=1e-5, rtol=1e-5)
    assert refurbished > 5


def round_off(x):
    """0.4 * 5 is 2.0000000000000004 in some orders of multiplication."""
    return round(x, 9)


def test_nothing_is_refurbished_before_its_history_is_full(trained):
    never = trained(SELFIE(warm_up=0, history=7, threshold=-1.0, rate=0.5))  # six predictions in three rounds
    always = {"warm_up": 0, "rate": 0.5, "threshold": 1.0}
    assert torch.equal(trained(SELFIE(history=7, **always)), never)
    assert not torch.equal(trained(SELFIE(history=6, **always)), never)


def test_settings():
    for wrong in ({"rate": 1.0}, {"rate": -0.1}, {"history": 0}, {"warm_up": -1}):
        with pytest.raises(ValueError, match="need rate in"):
            SELFIE(**wrong)
