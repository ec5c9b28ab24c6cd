"""Views: what may change in them, that they can be drawn alone, and that training looks at them."""

import pytest
import torch

from anabranch.federated.augment import DROPPED, NOISE, augment
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule
from anabranch.federated.streams import Streams

STREAMS = Streams(3, torch.tensor([5, 2]), 1)
SAMPLES = {
    "pictures": torch.arange(1.0, 2 * 40 * 3 * 16 * 9 + 1).view(2, 40, 3, 16, 9),
    "vectors": torch.zeros(2, 40, 500),
    "texts": torch.arange(1, 2 * 40 * 50 + 1).view(2, 40, 50),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_view_is_a_samples_own(kind):
    x = SAMPLES[kind]
    view = augment(x, STREAMS, 7, 2)
    assert view.shape == x.shape
    assert view.dtype == x.dtype
    for i, client in enumerate(STREAMS.clients.tolist()):
        alone = augment(x[i : i + 1, :13], Streams(3, torch.tensor([client]), 1), 7, 2)
        assert torch.equal(alone[0], view[i, :13])
    for other in (
        augment(x, STREAMS, 8, 2),
        augment(x, STREAMS, 7, 1),
        augment(x, Streams(4, STREAMS.clients, 1), 7, 2),
    ):
        assert not torch.equal(other, view)


def test_pictures_are_shifted_and_mirrored_and_nothing_else():
    x = SAMPLES["pictures"]
    moves = set()
    for before, after in zip(x.flatten(0, 1), augment(x, STREAMS, 0).flatten(0, 1), strict=True):
        padded = torch.nn.functional.pad(before, (1, 1, 2, 2))  # an eighth of 16 and, at least one, of 9
        moves.add(
            next(
                (down, right, mirrored)
                for down in range(5)
                for right in range(3)
                for mirrored in (False, True)
                for crop in [padded[:, down : down + 16, right : right + 9]]
                if torch.equal(crop.flip(2) if mirrored else crop, after)
            )
        )
    assert {move[0] for move in moves} == set(range(5))
    assert {move[1] for move in moves} == set(range(3))
    assert {move[2] for move in moves} == {False, True}


def test_vectors_get_noise():
    noise = augment(SAMPLES["vectors"], STREAMS, 0)
    n = noise.numel()  # within 5 standard errors
    assert abs(float(noise.mean())) < 5 * NOISE / n**0.5
    assert abs(float(noise.std()) - NOISE) < 5 * NOISE / (2 * n) ** 0.5


def test_texts_lose_words_but_not_all():
    x = SAMPLES["texts"]
    view = augment(x, STREAMS, 0)
    lost = view == 0
    assert torch.equal(view[~lost], x[~lost])
    assert abs(float(lost.double().mean()) - DROPPED) < 5 * (DROPPED * (1 - DROPPED) / x.numel()) ** 0.5
    short = torch.tensor([[[9, 0, 0]] * 500])  # of one word and padding
    assert torch.equal(augment(short, Streams(0, torch.tensor([0]), 0), 0), short)


def test_training_looks_at_a_new_view_in_each_step():
    seen = []

    class Looking(FedAvg):
        def loss(self, visit, rows, batch):
            seen.append((batch.number, visit.data.x[0, batch.which[0]], batch.x[0]))
            return super().loss(visit, rows, batch)

    holdings = Holdings(torch.zeros(6, 4), torch.arange(6) % 3, [torch.arange(6)])
    federation = found(Looking(), MLP((4, 3)), holdings, Schedule(batch=3, epochs=2, augment=True))
    run_round(federation)
    assert len({number for number, _, _ in seen}) == 4
    streams = Streams(0, torch.tensor([0]), 0)
    for number, own, looked_at in seen:
        assert torch.equal(looked_at, augment(own[None], streams, number)[0])
        assert not torch.equal(looked_at, own)
