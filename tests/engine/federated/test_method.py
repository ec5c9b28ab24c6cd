"""What a visit offers to methods, and the choice of samples."""

import torch

from anabranch.federated.method import FedAvg
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.packed import subset
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule

NETWORK = MLP((4, 5, 3))
GENERATOR = torch.Generator().manual_seed(2)
X, Y = torch.randn(700, 4, generator=GENERATOR), torch.randint(3, (700,), generator=GENERATOR)


def test_a_review_says_of_all_samples_what_a_look_at_them_does():
    class Reviewing(FedAvg):
        networks = 2

        def begin(self, visit, rows):
            logits, features = visit.review(rows)
            out = visit.see(rows, visit.data.x, training=False)
            torch.testing.assert_close(logits, out.logits)
            torch.testing.assert_close(features, out.features)
            visit.notes["logits"] = logits

        def end(self, visit, rows):
            assert visit.notes["logits"].shape == (4, 600, 3)
            return rows

    run_round(
        found(Reviewing(), NETWORK, Holdings(X, Y, [torch.arange(600), torch.arange(600, 700)]), Schedule(epochs=1))
    )


def test_a_method_that_chooses_samples_trains_as_on_these_alone():
    class EverySecond(FedAvg):
        def samples(self, visit):
            return subset(visit.data, torch.arange(visit.data.y.shape[1]).expand_as(visit.data.y) % 2 == 0)

    def after(method, owned):
        federation = found(method, NETWORK, Holdings(X, Y, owned), Schedule(batch=3, epochs=2))
        run_round(federation)
        return federation.server["model"]

    owned = [torch.arange(8), torch.arange(10, 18)]  # as many each, so that both weigh the same in the mean
    assert torch.equal(after(EverySecond(), owned), after(FedAvg(), [mine[::2] for mine in owned]))
    assert not torch.equal(after(FedAvg(), owned), after(FedAvg(), [mine[::2] for mine in owned]))
