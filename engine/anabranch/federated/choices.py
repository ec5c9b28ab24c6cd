"""Methods and networks by the names that the command line and TOML files use."""

import re
from collections.abc import Mapping
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

from anabranch.data.labelled import Labelled
from anabranch.data.words import WORDS
from anabranch.federated import options
from anabranch.federated.method import FedAvg
from anabranch.federated.networks.cnn import CNN
from anabranch.federated.networks.layout import Network
from anabranch.federated.networks.mlp import MLP
from anabranch.federated.networks.resnet import ResNet
from anabranch.federated.networks.text import Text

# Name: where its class is, and options that differ from the class's own.
METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "fedavg": ("method.FedAvg", {}),
    "fedprox": ("methods.fedprox.FedProx", {}),
    "fedexp": ("methods.fedexp.FedExP", {}),
    "trimmed-mean": ("methods.robust.Robust", {"method.rule": "trimmed-mean", "method.f": 3}),
    "krum": ("methods.robust.Robust", {"method.rule": "krum", "method.f": 3}),
    "median": ("methods.robust.Robust", {"method.rule": "coordinate-median"}),
    "geometric-median": ("methods.robust.Robust", {}),
    "robust": ("methods.robust.Robust", {}),
    "clipping": ("methods.clipping.Clipping", {}),
    "co-teaching": ("methods.coteaching.CoTeaching", {}),
    "co-teaching-plus": ("methods.coteaching_plus.CoTeachingPlus", {}),
    "causal-transition": ("methods.causal_transition.CausalTransition", {}),
    "forward-correction": ("methods.forward_correction.ForwardCorrection", {}),
    "symmetric-ce": ("methods.symmetric_ce.SymmetricCE", {}),
    "selfie": ("methods.selfie.SELFIE", {}),
    "joint-optim": ("methods.joint_optim.JointOptim", {}),
    "dividemix": ("methods.dividemix.DivideMix", {}),
    "robustfl": ("methods.robustfl.RobustFL", {}),
    "fedlsr": ("methods.fedlsr.FedLSR", {}),
    "fedrn": ("methods.fedrn.FedRN", {}),
    "fednoro": ("methods.fednoro.FedNoRo", {}),
    "fedelc": ("methods.fedelc.FedELC", {}),
    "fedelr": ("methods.fedelr.FedELR", {}),
    "maskedoptim": ("methods.maskedoptim.MaskedOptim", {}),
    "fedcfa": ("methods.fedcfa.FedCFA", {}),
}
NETWORKS = {
    "mlp": ("vector", "image"),
    "cnn": ("image",),
    "resnet10": ("image",),
    "resnet18": ("image",),
    "text": ("text",),
}


class Chosen(NamedTuple):
    """A method and what the user calls it, such as `fedprox:mu=0.1`."""

    name: str
    method: FedAvg


def method_class(name: str) -> type[FedAvg]:
    """The class of a method. ValueError lists the names there are."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {sorted(METHODS)}")
    module, _, cls = METHODS[name][0].rpartition(".")
    found: type[FedAvg] = getattr(import_module(f"anabranch.federated.{module}"), cls)
    return found


def choose_method(text: str, given: Mapping[str, Any] | None = None) -> Chosen:
    """The method of `NAME` or `NAME:option=value,option=value`, and further options."""
    name, _, rest = text.partition(":")
    cls = method_class(name)
    own = options.pairs_of(re.split(r",(?=[\w.]+=)", rest)) if rest else {}  # values may have commas of their own
    method = options.make(cls, {**METHODS[name][1], **own, **(given or {})}, what=f"method {name}")
    told = {**own, **(given or {})}
    return Chosen(":".join([name, *([",".join(f"{k}={v}" for k, v in told.items())] if told else [])]), method)


def choose_network(name: str, data: Labelled, hidden: tuple[int, ...]) -> Network:
    """A network for the samples of a task. `hidden`: widths of the perceptron's layers in between."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; choose one of {sorted(NETWORKS)}")
    if data.kind not in NETWORKS[name]:
        fitting = [network for network, kinds in NETWORKS.items() if data.kind in kinds]
        raise ValueError(
            f"network {name} is not for data of kind {data.kind!r}, as {data.name} is; choose one of {fitting}"
        )
    shape = data.x.shape[1:]
    if name == "mlp":
        return MLP((prod(shape), *hidden, data.classes))
    if name == "text":
        return Text(WORDS, data.classes)
    channels, height, width = shape
    if name == "cnn":
        return CNN(channels, height, width, data.classes)
    blocks = (1, 1, 1, 1) if name == "resnet10" else (2, 2, 2, 2)
    return ResNet(channels, height, width, data.classes, blocks=blocks)
