"""Bridge samples: pictures that both ends of a link can make of an embedding, by one frozen decoder that all share.

    conv      FedEEC's convolutional autoencoder, for pictures [channels, H, W] (vectors of H * H numbers are one)
    pca:32    the first 32 principal components, for pictures and other vectors
    random    embeddings that say nothing of their samples, decoded by `pca:32`: a bridge that leads nowhere

It is fitted to PUBLIC samples, which no leaf has, and learns nothing of labels. An embedding and a decoder that all
know give an approximate picture: embeddings are not private, and nothing here says so.

From the code        (FedAgg's demo, arXiv 2312.11489) encoder and decoder layer by layer: [3, 32, 32] -> [4, 8, 8].
Reconstructed here   its fitting (Adam on squared errors), which the demo loads; other sizes of pictures. The sigmoid's
                     [0, 1] is stretched to the range of the public samples, channel by channel: in the demo bridge
                     samples live in [0, 1] and real ones in normalised space, so one network learns from two scales.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, STEPS, LR = 32, 400, 0.01
PIECE = 512  # samples that are encoded or decoded at a time
DEPTH = 4  # channels of the conv embedding


class Bridge(Protocol):
    """size   numbers of an embedding"""

    size: int

    def encode(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, size] float32."""
        ...

    def decode(self, e: Tensor) -> Tensor:
        """[n, size] -> [n, ...]."""
        ...


class Range(NamedTuple):
    """The lowest and the highest number of public samples, of each channel where there are channels."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Range":
        inside = (0, *range(2, x.ndim)) if x.ndim > 2 else (0, 1)
        return cls(x.amin(inside, keepdim=True), x.amax(inside, keepdim=True))


def fit(text: str, public: Tensor, generator: torch.Generator) -> Bridge:
    """The bridge of a text such as those above, fitted to public samples [n, ...]. ValueError says what is allowed."""
    if not public.is_floating_point():
        raise ValueError("bridges are made of pictures and vectors; these data are words")
    name, given, amount = text.partition(":")
    if name == "pca" and given and amount.isdecimal():
        return PCA(public, int(amount))
    if text == "conv":
        return Convolutional(public, generator)
    if text == "random":
        return Nowhere(public, generator)
    raise ValueError(f"bridge is conv, pca:COMPONENTS or random, got {text!r}")


class PCA:
    """Mean and principal components of public samples; what they miss is lost."""

    def __init__(self, public: Tensor, components: int) -> None:
        flat = public.flatten(1).double()
        most = min(len(flat), flat.shape[1])
        if not 1 <= components <= most:
            raise ValueError(
                f"{len(flat)} public samples of {flat.shape[1]} numbers have 1 to {most} components, got {components}"
            )
        self.size, self.range, self._shape = components, Range.of(public), public.shape[1:]
        mean = flat.mean(0)
        self._mean = mean.float()
        self._axes = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors.flip(1)[:, :components].float()

    def encode(self, x: Tensor) -> Tensor:
        embedded: Tensor = (x.flatten(1) - self._mean) @ self._axes
        return embedded

    def decode(self, e: Tensor) -> Tensor:
        decoded: Tensor = (self._mean + e @ self._axes.T).unflatten(1, self._shape)
        return decoded.clamp(*self.range)


class Nowhere:
    """Normal embeddings, as spread as those of the principal components, whatever the samples are."""

    def __init__(self, public: Tensor, generator: torch.Generator) -> None:
        self._pca = PCA(public, min(32, len(public), public[0].numel()))
        self.size, self._generator = self._pca.size, generator
        self._spread = self._pca.encode(public).std(0)

    def encode(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), self.size, generator=self._generator) * self._spread

    def decode(self, e: Tensor) -> Tensor:
        return self._pca.decode(e)


class Convolutional:
    """Three convolutions down to four channels of a sixteenth of the pixels, four up again."""

    def __init__(self, public: Tensor, generator: torch.Generator) -> None:
        self._shape, pictures = public.shape[1:], _as_pictures(public)
        channels, H, W = pictures.shape[1:]
        if min(H, W) < 4:
            raise ValueError(f"conv needs pictures of at least 4 by 4 pixels, got {H} by {W}; choose pca:COMPONENTS")
        self.range = Range.of(pictures)
        self._small = DEPTH, H // 4, W // 4
        self.size = DEPTH * (H // 4) * (W // 4)
        self._encoder = nn.Sequential(
            *_layer(channels, 16), nn.MaxPool2d(2), *_layer(16, 8), nn.MaxPool2d(2), nn.Conv2d(8, DEPTH, 3, padding=1),
            nn.ReLU(),
        )  # fmt: skip
        self._decoder = nn.Sequential(
            nn.Conv2d(DEPTH, 8, 3, padding=1), nn.ReLU(), *_layer(8, 8), _larger(H // 2, W // 2), *_layer(8, 16),
            _larger(H, W), nn.Conv2d(16, channels, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip
        self._fit(pictures, generator)

    def _fit(self, pictures: Tensor, generator: torch.Generator) -> None:
        both = nn.Sequential(self._encoder, self._decoder)
        for layer in both.modules():
            if isinstance(layer, nn.Conv2d):
                bound = layer.weight[0].numel() ** -0.5  # as torch draws them, from numbers of our own
                for parameter in layer.parameters():
                    parameter.data.copy_(torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound))
        aim = (pictures - self.range.low) / (self.range.high - self.range.low).clamp_min(1e-12)
        optimiser = torch.optim.Adam(both.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for _ in range(STEPS):
            which = torch.randint(len(aim), (BATCH,), generator=generator)
            optimiser.zero_grad()
            F.mse_loss(both(pictures[which]), aim[which]).backward()
            optimiser.step()
            schedule.step()
        both.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([self._encoder(part).flatten(1) for part in _as_pictures(x).split(PIECE)])

    def decode(self, e: Tensor) -> Tensor:
        parts = [self._decoder(part) for part in e.unflatten(1, self._small).split(PIECE)]
        return (self.range.low + torch.cat(parts) * (self.range.high - self.range.low)).view(len(e), *self._shape)


def _layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def _larger(height: int, width: int) -> nn.Module:
    return nn.Upsample((height, width), mode="bilinear", align_corners=True)


def _as_pictures(x: Tensor) -> Tensor:
    """[n, channels, H, W]; a vector of H * H numbers is a picture of one channel."""
    if x.ndim == 4:
        return x
    side = int(x.shape[1] ** 0.5 + 0.5)
    if x.ndim != 2 or side * side != x.shape[1]:
        raise ValueError(
            f"conv needs pictures, or vectors of H * H numbers, got {list(x.shape[1:])}; choose pca:COMPONENTS"
        )
    return x.view(len(x), 1, side, side)
