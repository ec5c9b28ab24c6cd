"""Bridges: what comes back of a sample, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

from anabranch.federated.tree.bridge import fit


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(3)


def test_all_components_give_the_sample_back_and_few_the_best_of_that_rank():
    public = drawn(40, 6)
    whole = fit("pca:6", public, generator())
    assert_close(whole.decode(whole.encode(public)), public, atol=1e-5, rtol=0)
    two = fit("pca:2", public, generator())
    centred = (public - public.mean(0)).double()
    U, S, V = torch.linalg.svd(centred, full_matrices=False)
    best = (U[:, :2] * S[:2]) @ V[:2] + public.double().mean(0)
    best = best.clamp(public.min(), public.max())  # bridge samples stay in the range of the public ones
    assert_close(two.decode(two.encode(public)), best.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "size"), [((64,), 16), ((1, 28, 28), 196), ((3, 32, 32), 256), ((2, 9, 6), 8)])
def test_the_autoencoder_has_the_sizes_of_its_paper_and_those_of_other_pictures(shape, size, monkeypatch):
    monkeypatch.setattr("anabranch.federated.tree.bridge.STEPS", 2)
    public = drawn(8, *shape) * 5 - 2
    bridge = fit("conv", public, generator())
    e = bridge.encode(public)
    assert e.shape == (8, size) == (8, bridge.size)
    assert e.dtype == torch.float32
    decoded = bridge.decode(e)
    assert decoded.shape == public.shape
    assert public.min() <= decoded.min()
    assert decoded.max() <= public.max()
    alone = torch.cat([bridge.decode(bridge.encode(one[None])) for one in public])
    assert_close(decoded, alone, atol=1e-5, rtol=1e-5)  # frozen: nothing depends on the others of a batch


def test_the_autoencoder_learns_and_is_the_same_again(monkeypatch):
    """Blobs at places of their own: much nearer than their mean, which is what an embedding of nothing would give."""
    monkeypatch.setattr("anabranch.federated.tree.bridge.STEPS", 120)
    at, grid = drawn(60, 2, 1, 1) * 8, torch.arange(8.0)
    x = torch.exp(-((grid[:, None] - at[:, 0]).square() + (grid - at[:, 1]).square()) / 4).flatten(1)
    bridge, again = (fit("conv", x, generator()) for _ in range(2))
    e = bridge.encode(x)
    assert torch.equal(e, again.encode(x))
    assert float((bridge.decode(e) - x).square().mean()) < 0.5 * float((x - x.mean(0)).square().mean())


def test_a_bridge_to_nowhere_says_nothing_of_its_samples():
    public = drawn(50, 9)
    bridge = fit("random", public, generator())
    assert bridge.encode(public[:1].expand(2000, -1)).std(0).min() > 0
    first, second = (fit("random", public, generator()).encode(x) for x in (public, public.flip(0)))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("text", "x", "said"),
    [
        ("vae", drawn(5, 16), "bridge is conv, pca:COMPONENTS or random"),
        ("pca", drawn(5, 16), "bridge is"),
        ("pca:0", drawn(5, 16), "have 1 to 5 components"),
        ("pca:6", drawn(5, 16), "have 1 to 5 components"),
        ("conv", drawn(5, 15), "vectors of H"),
        ("conv", drawn(5, 9), "at least 4 by 4"),
        ("conv", torch.ones(5, 16, dtype=torch.int64), "these data are words"),
    ],
)
def test_bridges_that_cannot_be_built(text, x, said):
    with pytest.raises(ValueError, match=said):
        fit(text, x, generator())
