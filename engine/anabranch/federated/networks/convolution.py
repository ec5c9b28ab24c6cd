"""Convolutions and normalisations of many clients' pictures, each client with weights of its own.

x is [N, B, c, h, w] throughout. One client is computed by torch's own convolution; several by one with groups.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.layout import Views, uniform

RUNNING = 0.1  # share of a batch in running statistics, as in torch.nn.BatchNorm2d


def conv(
    x: Tensor, views: Views, name: str, *, stride: int = 1, padding: int = 1, channels_last: bool = False
) -> Tensor:
    """weight [N, o, c, k, k], perhaps a bias [N, o] -> [N, B, o, h', w'].

    channels_last   in memory, of a client alone: torch pools ten times as fast then, and normalises more slowly
    """
    weight, bias = views[f"{name}.weight"], views.get(f"{name}.bias")
    if len(x) == 1:
        x, weight, bias = x.squeeze(0), weight.squeeze(0), None if bias is None else bias.squeeze(0)
        if channels_last:
            x, weight = _channels_last(x), _channels_last(weight)
        return F.conv2d(x, weight, bias, stride, padding).unsqueeze(0)
    N, o = weight.shape[:2]
    flat_bias = None if bias is None else bias.flatten()
    y = F.conv2d(x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1), flat_bias, stride, padding, groups=N)
    apart: Tensor = y.unflatten(1, (N, o))
    return apart.transpose(0, 1)


def _channels_last(x: Tensor) -> Tensor:
    """[B, c, h, w]; strides that say so even of a single channel, to which torch's own order is no order."""
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def max_pool(x: Tensor, size: int = 2) -> Tensor:
    pooled: Tensor = F.max_pool2d(x.flatten(0, 1), size).unflatten(0, x.shape[:2])
    return pooled


def group_norm(x: Tensor, views: Views, name: str, groups: int) -> Tensor:
    """Over groups of channels of each picture; scaled and shifted by each client's own numbers."""
    y = F.group_norm(x.flatten(0, 1), groups).view_as(x)
    return _affine(y, views, name)


def batch_norm(x: Tensor, views: Views, name: str, *, training: bool) -> tuple[Tensor, list[Tensor]]:
    """Over a client's batch; also its running mean and variance afterwards, [N, c] each.

    Only for one client at a time in training: the filling of a shorter batch would count.
    """
    mean, variance = (views[f"{name}.{what}"].detach() for what in ("mean", "variance"))
    if not training:
        y = (x - mean[:, None, :, None, None]) * (variance + 1e-5).rsqrt()[:, None, :, None, None]
        return _affine(y, views, name), []
    assert len(x) == 1
    mean, variance = mean.clone(), variance.clone()
    y = F.batch_norm(x[0], mean[0], variance[0], training=True, momentum=RUNNING)[None]
    return _affine(y, views, name), [mean, variance]


def _affine(y: Tensor, views: Views, name: str) -> Tensor:
    scale, shift = views[f"{name}.scale"], views[f"{name}.shift"]
    return torch.addcmul(shift[:, None, :, None, None], y, scale[:, None, :, None, None])


def first_values(shapes: Mapping[str, Sequence[int]], generator: torch.Generator) -> Tensor:
    """A row for tensors named as above: weights and biases as torch.nn draws them, norms that change nothing."""
    parts, inputs = [], 1
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if kind == "weight":  # [o, c, k, k], or [in, out] of a linear layer
            inputs = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[0]
        if kind in ("weight", "bias"):
            parts.append(uniform(shape, inputs, generator).flatten())
        else:
            fill = torch.ones if kind in ("scale", "variance") else torch.zeros
            parts.append(fill(*shape).flatten())
    return torch.cat(parts)
