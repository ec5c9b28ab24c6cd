"""fastText: the mean of a text's word vectors, then two linear layers (Joulin et al., arXiv 1607.01759)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.networks.convolution import first_values
from anabranch.federated.networks.layout import Layout, Views, linear

PADDING = 0  # the id that is no word


class Text:
    """Texts are word ids [L] int64 below `vocabulary`, filled up with PADDING. The latents are the first layer's."""

    batch_statistics = False

    def __init__(self, vocabulary: int, classes: int, *, width: int = 256) -> None:
        if vocabulary < 2 or width < 1:
            raise ValueError(f"need a vocabulary of at least 2 ids and a width of 1, got {vocabulary} and {width}")
        self.classes = classes
        self.layout = Layout({
            "words": (vocabulary, width),
            "0.weight": (width, width), "0.bias": (width,),
            "1.weight": (width, classes), "1.bias": (classes,),
        })  # fmt: skip
        self.flops = 2 * width * (width + classes)

    def first(self, generator: torch.Generator) -> Tensor:
        """Word vectors are normal, as torch.nn.Embedding's."""
        shapes = dict(self.layout.shapes)
        words = torch.randn(shapes.pop("words"), generator=generator)
        return torch.cat([words.flatten(), first_values(shapes, generator)])

    def encode(self, views: Views, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        words = views["words"]
        N, V, _ = words.shape
        real = x != PADDING
        share = real / real.sum(-1, keepdim=True).clamp_min(1)
        ids = (x + V * torch.arange(N)[:, None, None]).flatten(0, 1)
        weights = share.flatten(0, 1).to(words.dtype)
        h = F.embedding_bag(ids, words.flatten(0, 1), mode="sum", per_sample_weights=weights).unflatten(0, x.shape[:2])
        return linear(h, views["0.weight"], views["0.bias"]), []

    def decode(self, views: Views, latent: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        return linear(latent, views["1.weight"], views["1.bias"]), latent, []
