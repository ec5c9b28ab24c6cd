"""Networks of rows beside torch.nn, one at a time beside all together."""

import pytest
import torch
from torch import nn

from anabranch.federated.method import FedAvg
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.layout import forward
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.networks.text import Text
from anabranch.federated.rounds import Holdings, found, run_round
from anabranch.federated.schedule import Schedule


def images(*shape, seed=0):
    return torch.randn(*shape, 2, 12, 8, generator=torch.Generator().manual_seed(seed))


def ids(*shape):
    x = torch.randint(1, 30, (*shape, 7), generator=torch.Generator().manual_seed(0))
    x[..., 5:] = 0
    x[0, 0] = 0  # an empty text
    return x


CASES = {
    "mlp": (MLP((192, 9, 7, 3)), images),
    "perceptron": (MLP((192, 3)), images),
    "cnn": (CNN(2, 12, 8, 3, wide=4, features=5), images),
    "resnet": (ResNet(2, 12, 8, 3, wide=8, blocks=(1, 2, 1, 1), groups=4), images),
    "resnet, batch norm": (ResNet(2, 12, 8, 3, wide=8, blocks=(1, 1, 1, 1), norm="batch"), images),
    "text": (Text(30, 3, width=6), ids),
}


@pytest.fixture(params=CASES)
def case(request):
    network, make = CASES[request.param]
    rows = torch.stack([network.first(torch.Generator().manual_seed(i)) for i in range(3)])
    return network, rows, make


def test_rows_alone_and_together(case):
    network, rows, make = case
    x = make(3, 4)
    together = forward(network, rows, x)
    for i in range(3):
        alone = forward(network, rows[i : i + 1], x[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.features[i], alone.features[0], atol=1e-5, rtol=1e-5)


def test_every_trained_number_has_a_gradient(case):
    network, rows, make = case
    rows = rows[:1].clone().requires_grad_()
    x = make(1, 6)
    forward(network, rows, x, training=True).logits.square().sum().backward()
    views = network.layout.views(rows.grad)
    kept = ("mean", "variance")
    for name, slope in views.items():
        if name == "words":  # of words that occur
            assert (slope[0, x.unique()[1:]].abs().sum(1) > 0).all()
        else:
            assert bool((slope != 0).any()) == (name.rpartition(".")[2] not in kept), name


def test_sizes_and_shapes(case):
    network, rows, make = case
    out = forward(network, rows, make(3, 4))
    assert out.logits.shape == (3, 4, network.classes)
    assert rows.shape[1] == network.layout.size >= network.layout.trained
    assert network.flops > 0


def test_a_model_by_name_and_back(case):
    """Three networks: no two tensors have one name."""
    network, rows, _ = case
    named = network.layout.named(rows)
    assert len(named) == 3 * len(network.layout.shapes)
    first = next(iter(network.layout.shapes))
    assert named[f"2.{first}"].shape == network.layout.shapes[first]
    assert torch.equal(network.layout.model(dict(reversed(named.items()))), rows)


def plain_resnet(norm):
    """ResNet by torch.nn, two stages of one block with a stride between, as ours names its tensors."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.a, self.b = (
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            )
            self.na, self.nb = norm(outputs), norm(outputs)
            self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None
            self.ns = norm(outputs) if stride > 1 else None

        def forward(self, x):
            y = self.nb(self.b(torch.relu(self.na(self.a(x)))))
            return torch.relu(y + (x if self.short is None else self.ns(self.short(x))))

    blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 1, 1, bias=False),
        norm(8),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_resnet_is_torchs(kind):
    network = ResNet(2, 12, 8, 3, wide=8, blocks=(1, 1, 1, 1), norm=kind, groups=4)
    row = network.first(torch.Generator().manual_seed(0))
    row += 0.1 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)).abs()  # norms are not the identity
    views = {name: view[0] for name, view in network.layout.views(row[None]).items()}
    plain = plain_resnet(nn.BatchNorm2d if kind == "batch" else lambda channels: nn.GroupNorm(4, channels))
    names = {"0": "stem", "1": "stem", "9": "head"}
    for block in range(4):
        for theirs, ours in {"a": "a", "na": "a", "b": "b", "nb": "b", "short": "short", "ns": "short"}.items():
            names[f"{3 + block}.{theirs}"] = f"{block}.0.{ours}"
    state = {}
    for key in plain.state_dict():
        module, _, kind_of = key.rpartition(".")
        layer = plain.get_submodule(module)
        normal = isinstance(layer, nn.GroupNorm | nn.BatchNorm2d)
        ours = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "variance"} if normal else {}
        if kind_of == "num_batches_tracked":
            state[key] = torch.tensor(0)
            continue
        value = views[f"{names[module]}.{ours.get(kind_of, kind_of)}"]
        state[key] = value.T if isinstance(layer, nn.Linear) and kind_of == "weight" else value
    plain.load_state_dict(state)
    x = images(5)
    plain.eval()
    torch.testing.assert_close(forward(network, row[None], x[None]).logits[0], plain(x), atol=1e-5, rtol=1e-5)
    plain.train()
    out = forward(network, row[None], x[None], training=True)
    torch.testing.assert_close(out.logits[0], plain(x), atol=1e-4, rtol=1e-4)
    if kind == "batch":
        running = torch.cat([value.flatten() for key, value in plain.state_dict().items() if "running" in key])
        assert out.statistics is not None
        assert out.statistics.shape == (1, len(running))
        torch.testing.assert_close(out.statistics[0].sort().values, running.sort().values, atol=1e-5, rtol=1e-5)


def test_statistics_are_sent_and_averaged():
    network = CASES["resnet, batch norm"][0]
    x, y = images(12), torch.arange(12) % 3
    federation = found(FedAvg(), network, Holdings(x, y, torch.arange(12).split([5, 7])), Schedule(epochs=1, batch=4))
    before = network.layout.views(federation.server["model"])["stem.mean"].clone()
    run_round(federation)
    views = network.layout.views(federation.server["model"])
    assert not torch.equal(views["stem.mean"], before)
    assert (views["stem.variance"] > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((5,)), "widths"),
        (lambda: CNN(1, 3, 9, 2), "4 pixels"),
        (lambda: ResNet(1, 8, 8, 2, norm="layer"), "norm must be"),
        (lambda: ResNet(1, 8, 8, 2, wide=12), "groups that divide"),
        (lambda: Text(1, 2), "vocabulary"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
