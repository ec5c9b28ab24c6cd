"""Classification data as NumPy's archives hold them. Nothing in one is unpickled."""

import io
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.data import pictures
from anabranch.data.labelled import Labelled, split

MOST_BYTES = 4 << 30  # that an archive may become when it is unpacked


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz, or of one compressed with xz. ValueError where it is not there, damaged or too large."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError("it unpacks to more than 4 GiB")
            return dict(np.load(io.BytesIO(content), allow_pickle=False))
        return dict(np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError, TypeError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as NumPy's .npz: {error}") from error


def read_npz(path: Path, names: tuple[str, ...] = ()) -> Labelled:
    """An .npz with x and y, and if they are there test_x and test_y, or is_test [M] bool; client [M]; names [C].

    x    uint8 [M, H, W] or [M, H, W, 1 or 3]: pictures, each channel brought to mean 0 and deviation 1
         numbers [M, D]: vectors as they are, but uint8 divided by 255
         floats [M, channels, H, W]: pictures as they are
    """
    stored = read_arrays(path)
    missing = {"x", "y"} - stored.keys()
    if missing or stored["y"].shape != stored["x"].shape[:1]:
        shapes = {name: array.shape for name, array in stored.items()}
        raise ValueError(f"{path} must hold x [M, ...] and y [M], one label a sample; got {shapes}")
    x, y, owners = stored["x"], torch.from_numpy(stored["y"].astype(np.int64)), stored.get("client")
    if "test_x" in stored:
        test_x, test_y = stored["test_x"], torch.from_numpy(stored["test_y"].astype(np.int64))
    else:
        is_test = stored.get("is_test")
        if is_test is None:
            mine = split(torch.arange(len(y)), y)
            is_test = np.isin(np.arange(len(y)), mine.test_x.numpy())
        keep = ~is_test.astype(bool)
        test_x, test_y, x, y = x[~keep], y[~keep], x[keep], y[keep]
        owners = None if owners is None else owners[keep]
    kind, shown, test_shown = _shown(path, x, test_x)
    classes = int(max(y.max(), test_y.max())) + 1
    called = [str(name) for name in stored["names"]] if "names" in stored else names or [str(i) for i in range(classes)]
    numbered = None if owners is None else torch.from_numpy(np.unique(owners, return_inverse=True)[1].astype(np.int64))
    return Labelled(
        name=path.stem, kind=kind, x=shown, y=y, test_x=test_shown, test_y=test_y, names=called, owners=numbered
    )


def _shown(path: Path, x: Any, test_x: Any) -> tuple[str, Tensor, Tensor]:
    if x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))):
        return "image", *pictures.standardise(x, test_x)
    kind = {2: "vector", 4: "image"}.get(x.ndim)
    if kind is None or x.dtype.kind not in "fiu" or (kind == "image" and x.dtype.kind != "f"):
        raise ValueError(
            f"{path}: x must be uint8 [M, H, W] or [M, H, W, 1 or 3], numbers [M, D] or floats [M, channels, H, W]; "
            f"got {x.dtype} {list(x.shape)}"
        )
    scale = 255 if x.dtype == np.uint8 else 1
    as_floats = [torch.from_numpy(array.astype(np.float32)) / scale for array in (x, test_x)]
    return kind, as_floats[0], as_floats[1]
