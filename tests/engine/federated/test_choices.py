"""Every name leads to a method or network that works."""

import pytest
import torch

from anabranch.data.labelled import Labelled
from anabranch.federated.choices import METHODS, NETWORKS, choose_method, choose_network, method_class
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.layout import forward


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_made_by_its_name(name):
    chosen = choose_method(name)
    assert (chosen.name, type(chosen.method)) == (name, method_class(name))
    assert isinstance(chosen.method, FedAvg)


def test_options_stand_in_the_name_or_beside_it():
    chosen = choose_method("fedcfa:weights=1,2,3,group=7", {"replaced": "0.5"})
    assert (chosen.method.weights, chosen.method.group, chosen.method.replaced) == ((1.0, 2.0, 3.0), 7, 0.5)
    assert chosen.name == "fedcfa:weights=1,2,3,group=7,replaced=0.5"
    with pytest.raises(ValueError, match=r"unknown method 'fed'; choose one of .*'fedavg'"):
        choose_method("fed")
    with pytest.raises(ValueError, match=r"method fedavg has no option 'mu'; its options are mean\.NAME"):
        choose_method("fedavg", {"mu": "1"})


SAMPLES = {
    "vector": torch.zeros(4, 6), "image": torch.zeros(4, 1, 8, 8), "text": torch.zeros(4, 5, dtype=torch.int64),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in NETWORKS.items() for kind in kinds])
def test_every_network_takes_the_kinds_of_data_it_is_for(name, kind):
    x, y = SAMPLES[kind], torch.tensor([0, 1, 2, 0])
    data = Labelled(name="drawn", kind=kind, x=x, y=y, test_x=x, test_y=y, names="abc")
    network = choose_network(name, data, (5,))
    row = network.first(torch.Generator().manual_seed(0))
    assert forward(network, row[None], x[None]).logits.shape == (1, 4, 3)


def test_networks_for_other_data_are_refused():
    x, y = SAMPLES["text"], torch.tensor([0, 1, 2, 0])
    data = Labelled(name="drawn", kind="text", x=x, y=y, test_x=x, test_y=y, names="abc")
    with pytest.raises(ValueError, match=r"cnn is not for data of kind 'text', as drawn is; choose one of \['text'\]"):
        choose_network("cnn", data, ())
    with pytest.raises(ValueError, match="unknown network 'vit'"):
        choose_network("vit", data, ())
