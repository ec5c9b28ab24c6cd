"""Pictures as tensors: JPEGs in a buffer, files in folders of classes. Decoding needs Pillow: the extra `federated`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anabranch.data.labelled import Labelled, split

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST_BYTES = 8 << 30  # of one data set as float32; far above what is meant, far below a mistake

Pixels = npt.NDArray[np.uint8]


def standardise(train: Pixels, test: Pixels) -> tuple[Tensor, Tensor]:
    """Pixels [M, H, W] or [M, H, W, channels] as float32 [M, channels, H, W], of mean 0 and deviation 1.

    Each channel by the mean and deviation of the pictures to learn from. Raises ValueError for more than 8 GiB.
    """
    if (len(train) + len(test)) * train[0].size * 4 > MOST_BYTES:
        raise ValueError(f"{len(train) + len(test)} pictures of {train[0].size} numbers take more than 8 GiB")
    x, test_x = _channels_first(train), _channels_first(test)
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1.0)
    return x.sub_(mean).div_(deviation), test_x.sub_(mean).div_(deviation)


def _channels_first(pixels: Pixels) -> Tensor:
    x = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None])
    return x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def decode(pictures: Sequence[Any], *, size: int | None) -> Pixels:
    """Paths of files, their bytes or open pictures of Pillow as pixels [M, H, W, 3].

    ValueError for what is no picture, and where they differ in size and none is given.

    size    pixels a side that each is resized to; None keeps them
    """
    image = _pillow()
    first: Pixels | None = None
    pixels: Pixels = np.zeros((0, 0, 0, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        try:
            if isinstance(picture, image.Image):
                shown = picture.convert("RGB")
            else:
                with image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
                    shown = opened.convert("RGB")
        except (OSError, SyntaxError, image.DecompressionBombError) as error:
            raise ValueError(
                f"picture {picture if isinstance(picture, Path) else i} cannot be read: {error}"
            ) from error
        one = np.asarray(shown.resize((size, size), image.Resampling.BILINEAR) if size else shown)
        if first is None:
            first, pixels = one, np.empty((len(pictures), *one.shape), dtype=np.uint8)
        if one.shape != first.shape:
            raise ValueError(
                f"pictures must be of one size, got {first.shape[1]} x {first.shape[0]} and {one.shape[1]} x "
                f"{one.shape[0]}; give --picture-size to have them resized"
            )
        pixels[i] = one
    return pixels


def class_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Pictures below FOLDER/CLASS/, the number of each one's class, and the classes, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        paths, labels = paths + found, labels + [label] * len(found)
    if not paths:
        raise ValueError(f"{folder} holds no pictures in folders named for their classes, such as {folder}/cat/1.jpg")
    return paths, labels, names


def labelled(name: str, pixels: Pixels, labels: Tensor, count: int, names: list[str]) -> Labelled:
    """Pictures [M, H, W, 3] of which the first `count` are to learn from; for 0, a quarter is the test."""
    if count:
        train, test = torch.arange(len(labels)).tensor_split([count])
    else:
        parts = split(torch.arange(len(labels)), labels)
        train, test = parts.x, parts.test_x
    x, test_x = standardise(pixels[train.numpy()], pixels[test.numpy()])
    return Labelled(
        name=name, kind="image", x=x, y=labels[train], test_x=test_x, test_y=labels[test], names=names
    )  # fmt: skip


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'anabranch[federated]'") from error
    return Image
