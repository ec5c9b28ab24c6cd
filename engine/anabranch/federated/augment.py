"""Other views of the same samples: pictures shifted and mirrored, vectors with noise, texts with words left out.

A view is a function of (seed, client, round, number of the step, view) and of a sample's place in its batch, so clients
see the same whether they are trained alone or together.

    pictures  [N, B, c, h, w]  padded with zeros by an eighth of their side (4 pixels of 32), cropped to their size
                               anywhere, and half of them mirrored
    texts     [N, B, L] int64  each token becomes padding with probability DROPPED; a text that would lose all keeps all
    vectors   [N, B, ...]      plus normal numbers of standard deviation NOISE, for inputs whose range is about one
"""

import torch
from torch import Tensor

from anabranch.federated.streams import Purpose, Streams

VIEWS = 4  # of a step; the first is what training itself looks at
PADDING = 0  # token id
MARGIN, DROPPED, NOISE = 8, 0.1, 0.05


def augment(x: Tensor, streams: Streams, step: int, view: int = 0) -> Tensor:
    """One view of x [N, B, ...], of its shape and dtype; `view`, from 0 to 3, tells those of a step apart."""
    assert 0 <= view < VIEWS
    part = VIEWS * step + view
    if x.ndim == 5:
        return _moved(x, streams.words(4 * x.shape[1], Purpose.AUGMENT, part).unflatten(1, (-1, 4)))
    if not x.is_floating_point():
        return _shortened(x, streams.uniform(x[0].numel(), Purpose.AUGMENT, part).view(x.shape))
    noise = streams.normal(x[0].numel(), Purpose.AUGMENT, part).view(x.shape)
    return torch.add(x, noise, alpha=NOISE)


def _moved(x: Tensor, words: Tensor) -> Tensor:
    """Pictures shifted and mirrored by random words [N, B, 4], of which each takes three."""
    N, B, _, h, w = x.shape
    down = _shift(words[..., 0], h)
    right = _shift(words[..., 1], w)
    mirrored = words[..., 2] % 2 == 1
    columns = torch.where(mirrored[..., None], torch.arange(w).flip(0), torch.arange(w)) + right[..., None]
    rows = torch.arange(h) + down[..., None]
    inside = ((rows >= 0) & (rows < h))[..., :, None] & ((columns >= 0) & (columns < w))[..., None, :]
    place = rows.clamp(0, h - 1)[..., :, None] * w + columns.clamp(0, w - 1)[..., None, :]
    index = place.view(N, B, 1, h * w).expand(-1, -1, x.shape[2], -1)
    return x.flatten(3).gather(3, index).view(x.shape) * inside[:, :, None]


def _shift(words: Tensor, side: int) -> Tensor:
    """Pixels by which to shift, up to an eighth of a side, or one, either way; all equally likely."""
    most = max(1, side // MARGIN)
    return words % (2 * most + 1) - most


def _shortened(x: Tensor, draws: Tensor) -> Tensor:
    """Texts without some of their tokens; uniform draws [N, B, L]."""
    left = torch.where(draws < DROPPED, PADDING, x)
    empty = (left == PADDING).all(-1, keepdim=True)
    return torch.where(empty, x, left)
