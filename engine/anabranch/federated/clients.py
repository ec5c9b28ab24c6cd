"""All clients of a round trained at once: one batched product for each layer, whatever their number.

A model is one row of numbers: a perceptron with one hidden layer, 64 -> H -> 10, or without one for H = 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.digits import CLASSES, PIXELS


def layers(hidden: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of each layer."""
    return [(PIXELS, hidden), (hidden, CLASSES)] if hidden else [(PIXELS, CLASSES)]


def first_model(hidden: int, generator: torch.Generator) -> Tensor:
    """A row [D] of weights, each layer's drawn uniformly as torch.nn.Linear draws them, and zero biases."""
    parts = []
    for inputs, outputs in layers(hidden):
        weight = torch.rand(inputs * outputs, generator=generator) * 2 - 1
        parts += [weight / inputs**0.5, torch.zeros(outputs)]
    return torch.cat(parts)


def logits(models: Tensor, x: Tensor, hidden: int) -> Tensor:
    """Of N models [N, D] for n pictures each, [N, n, 64] -> [N, n, 10]."""
    start = 0
    for i, (inputs, outputs) in enumerate(layers(hidden)):
        weight = models[:, start : start + inputs * outputs].view(-1, inputs, outputs)
        bias = models[:, start + inputs * outputs : start + (inputs + 1) * outputs]
        x = torch.baddbmm(bias[:, None], F.relu(x) if i else x, weight)
        start += (inputs + 1) * outputs
    return x


def train(model: Tensor, x: Tensor, y: Tensor, *, hidden: int, steps: int, lr: float) -> Tensor:
    """What each of N clients makes of the model by `steps` of gradient descent on its own pictures: updates [N, D].

    model [D]   x [N, n, 64]   y [N, n]
    """
    models = model.expand(len(x), -1).clone().requires_grad_()
    for _ in range(steps):
        mean_of_each = F.cross_entropy(logits(models, x, hidden).transpose(1, 2), y, reduction="none").mean(1)
        (slope,) = torch.autograd.grad(mean_of_each.sum(), models)
        with torch.no_grad():
            models -= lr * slope
    return models.detach() - model


def accuracy(model: Tensor, x: Tensor, y: Tensor, hidden: int) -> float:
    """Share of pictures [M, 64] that a model [D] names as y [M] does."""
    return (logits(model[None], x[None], hidden)[0].argmax(1) == y).double().mean().item()
