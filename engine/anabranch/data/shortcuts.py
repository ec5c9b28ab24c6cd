"""Samples with a shortcut: a feature that tells the class inside each client, and nothing over all of them.

A network that learns the shortcut is right at home and wrong elsewhere (Simpson's paradox); FedCFA's promise, arXiv
2412.18904, is not to learn it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from anabranch.data.labelled import SPLIT_SEED, Labelled


def with_shortcut(data: Labelled, *, clients: int = 20, agree: float = 0.9, strength: float = 3.0) -> Labelled:
    """Vectors with one of C colours, `strength` times one-hot behind their numbers; samples get owners, evenly.

    clients   client k gives class y the colour (y + k) mod C, so for multiples of C nothing is left over all clients
    agree     share of the samples that have the colour of their class at their client, in the mean; the others have
              one of the others, and samples of the test any
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    C, M = data.classes, len(data.y)
    owners = torch.randperm(M, generator=generator) % clients
    wrong = (torch.rand(M, generator=generator) >= agree) * torch.randint(1, C, (M,), generator=generator)
    colours = (data.y + owners + wrong) % C
    test_colours = torch.randint(0, C, (len(data.test_y),), generator=generator)
    x, test_x = (
        torch.cat([x, strength * F.one_hot(of, C)], 1) for x, of in ((data.x, colours), (data.test_x, test_colours))
    )
    return replace(data, name=f"{data.name}-shortcut", x=x, test_x=test_x, owners=owners)
