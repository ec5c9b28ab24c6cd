"""Co-teaching+: the samples it learns from, one by one, and what it is without disagreement."""

import torch

from anabranch.federated.methods.coteaching import CoTeaching
from anabranch.federated.methods.coteaching_plus import CoTeachingPlus
from anabranch.federated.packed import Batch
from anabranch.federated.rounds import run_round


def test_before_its_start_it_is_coteaching(trained):
    assert torch.equal(trained(CoTeachingPlus(start=3)), trained(CoTeaching()))
    assert not torch.equal(trained(CoTeachingPlus(start=2)), trained(CoTeaching()))


def test_alone_and_together(same_alone_and_together):
    same_alone_and_together(CoTeachingPlus(forget=0.4, ramp=2, start=1), rounds=4)


def test_networks_that_always_agree_learn_from_everything(found_small, trained):
    federation = found_small(CoTeachingPlus(forget=0.4, ramp=0, start=0))
    federation.server["model"][1] = federation.server["model"][0]
    for _ in range(3):
        run_round(federation)
    first, second = federation.server["model"]
    assert torch.equal(first, second)
    assert torch.equal(first, trained(CoTeaching(forget=0))[0])


def test_which_samples_are_learned_from():
    class Visit:
        round = 5

    #                            apart   apart   same    apart   same    not real, apart
    predicted = torch.tensor([[[0, 1], [1, 0], [1, 1], [2, 0], [0, 0], [0, 1]]]).permute(2, 0, 1)[..., None]
    logits = torch.zeros(2, 1, 6, 3).scatter_(3, predicted, 1.0).flatten(0, 1)
    losses = torch.tensor([[3.0, 1.0, 0.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 2.0, 0.0, 0.0]])
    weight = (torch.arange(6) < 5)[None] / 5
    batch = Batch(torch.zeros(1, 6, 1), torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)[None], weight,
                  torch.tensor([True]), 0)  # fmt: skip
    taught = CoTeachingPlus(forget=0.34, ramp=0, start=5).taught(Visit(), logits, losses, batch)
    assert taught.int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]  # the other's worst of three is left out
    agreeing = logits[:1].repeat(2, 1, 1)
    taught = CoTeachingPlus(forget=0.34, ramp=0, start=5).taught(Visit(), agreeing, losses, batch)
    assert torch.equal(taught, batch.real.repeat(2, 1))
