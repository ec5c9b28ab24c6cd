"""Joint optimisation: labels before and after the warm-up, and its loss written plainly."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.federated.methods.joint_optim import JointOptim
from anabranch.federated.rounds import run_round


def test_with_labels_alone_that_never_change_it_is_fedavg(trained, by_steps):
    assert torch.equal(trained(JointOptim(alpha=0.0, beta=0.0, warm_up=99)), trained(by_steps))


@pytest.mark.parametrize("hard", [False, True])
def test_alone_and_together(same_alone_and_together, hard):
    same_alone_and_together(JointOptim(history=3, warm_up=1, hard=hard))


def test_the_loss_is_its_formula(found_small):
    federation = found_small(JointOptim(warm_up=99), batch=32, epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0)
    network, model, held = federation.network, federation.server["model"][0], federation.holdings
    total = torch.zeros_like(model)
    for owned in held.owned:
        row = model.clone().requires_grad_()
        views = network.layout.views(row[None])
        hidden = F.relu(held.x[owned] @ views["0.weight"][0] + views["0.bias"][0])
        p = (hidden @ views["1.weight"][0] + views["1.bias"][0]).softmax(-1)
        loss = F.nll_loss(p.log(), held.y[owned])
        loss = loss - 1.2 * (p.mean(0).log() / 3).sum() - 0.8 * (p * p.log()).sum(-1).mean()
        total += len(owned) * (row.detach() - 0.1 * torch.autograd.grad(loss, row)[0])
    run_round(federation)
    torch.testing.assert_close(federation.server["model"][0], total / len(held.y), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("history", [2, 5])
def test_labels_are_what_was_predicted_of_late(found_small, hard, history):
    said = {}

    class Watched(JointOptim):
        def loss(self, visit, rows, batch):
            p = visit.see(rows, batch.x).logits.softmax(-1).detach()
            for i, client in enumerate(visit.clients.tolist()):
                for which, prediction, real in zip(batch.which[i].tolist(), p[i], batch.real[i], strict=True):
                    if real:
                        said.setdefault((client, which), []).append(prediction)
            return JointOptim.loss(self, visit, rows, batch)

    federation = found_small(Watched(history=history, warm_up=1, hard=hard), share=0.5)
    y = federation.holdings.y.split([len(owned) for owned in federation.holdings.owned])
    run_round(federation)
    for client, kept in federation.kept.items():  # warming up
        assert torch.equal(kept["labels"], F.one_hot(y[client], 3).float())
    for _ in range(3):
        replies = run_round(federation)
    assert len(federation.kept) > 2
    for client in replies.clients.tolist():
        for i, label in enumerate(federation.kept[client]["labels"]):
            mean = torch.stack(said[client, i][-history:]).mean(0)
            expected = F.one_hot(mean.argmax(), 3).float() if hard else mean
            torch.testing.assert_close(label, expected, atol=1e-6, rtol=0)


def test_samples_never_predicted_keep_their_labels(found_small):
    federation = found_small(JointOptim(warm_up=0), drop_last=True, batch=5, epochs=1)
    run_round(federation)
    y = federation.holdings.y.split([len(owned) for owned in federation.holdings.owned])
    kept = federation.kept[0]  # 12 samples, two of which fill no batch
    unseen = kept["seen"] == 0
    assert unseen.sum() == 2
    assert torch.equal(kept["labels"][unseen], F.one_hot(y[0][unseen], 3).float())
    assert (kept["labels"][~unseen].max(1).values < 1).all()


def test_settings():
    for wrong in ({"alpha": -1.0}, {"beta": -1.0}, {"history": 0}, {"warm_up": -1}):
        with pytest.raises(ValueError, match="need alpha, beta and warm_up"):
            JointOptim(**wrong)


def test_training_keeps_shapes(found_small):
    """What is kept goes through a checkpoint: tensors of one entry a sample."""
    federation = found_small(JointOptim(history=4))
    run_round(federation)
    for client, kept in federation.kept.items():
        n = len(federation.holdings.owned[client])
        assert {name: tuple(value.shape) for name, value in kept.items()} == {
            "labels": (n, 3),
            "predicted": (n, 4, 3),
            "seen": (n,),
        }
