"""Forward correction with a known matrix, with one from anchors, and clients on their own."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.federated.method import FedAvg
from anabranch.federated.methods.forward_correction import ForwardCorrection
from anabranch.federated.rounds import run_round


def test_without_noise_it_is_fedavg(trained):
    for method in (ForwardCorrection(matrix="symmetric:0"), ForwardCorrection(warm_up=5)):
        assert_close(trained(method), trained(FedAvg()), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(trained(ForwardCorrection(matrix="pairflip:0.4")), trained(FedAvg()), atol=1e-3)


@pytest.mark.parametrize("matrix", ["anchors", "symmetric:0.4", "pairflip:0.3"])
def test_alone_and_together(same_alone_and_together, matrix):
    same_alone_and_together(ForwardCorrection(matrix=matrix, warm_up=1), rounds=3)


def test_matrices_that_are_known():
    T = ForwardCorrection(matrix="pairflip:0.4").first(FakeNetwork, 2)["transition"]
    assert_close(T, torch.tensor([[0.6, 0.0, 0.4], [0.4, 0.6, 0.0], [0.0, 0.4, 0.6]]))
    T = ForwardCorrection(matrix="symmetric:0.4").first(FakeNetwork, 2)["transition"]
    assert_close(T, torch.full((3, 3), 0.2) + 0.4 * torch.eye(3))


class FakeNetwork:
    classes = 3


def test_anchors_are_the_most_probable_samples_of_all_clients(found_small, monkeypatch):
    said = {}
    original = ForwardCorrection.reply

    def reply(self, visit, rows):
        p = visit.review(rows)[0].softmax(-1)
        for i, k in enumerate(visit.clients.tolist()):
            said[k] = p[i, : visit.data.counts[i]]
        return original(self, visit, rows)

    monkeypatch.setattr(ForwardCorrection, "reply", reply)
    federation = found_small(ForwardCorrection(warm_up=2))
    run_round(federation)
    assert torch.equal(federation.server["transition"], torch.eye(3))
    run_round(federation)
    everyone = torch.cat([said[k] for k in range(4)])
    assert_close(federation.server["transition"], everyone[everyone.argmax(0)])
    after = federation.server["transition"]
    run_round(federation)
    assert torch.equal(federation.server["transition"], after)


@pytest.mark.parametrize("wrong", ["pairflip", "symmetric:1.0", "human:0.3", "symmetric:x"])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="matrix is"):
        ForwardCorrection(matrix=wrong)
    with pytest.raises(ValueError, match="warm_up"):
        ForwardCorrection(warm_up=0)
