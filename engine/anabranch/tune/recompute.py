"""Activations computed again in the backward pass instead of kept: one more forward pass for most of the memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from anabranch.adapters.rank_lora import RankLora
from anabranch.models.transformer import Transformer


def recompute_activations(model: Transformer) -> None:
    """Keep only the input of each block of a model with adapters, in place; the gradients have the same bits.

    What adapters count in the forward pass they do not count again in the second one.
    """
    for block in model.blocks:
        routed = [module for module in block.modules() if isinstance(module, RankLora)]

        def contexts(
            routed: list[RankLora] = routed,
        ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _uncounted(routed)

        forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        block.forward = forward


@contextmanager
def _uncounted(layers: list[RankLora]) -> Iterator[None]:
    """Within, routed layers count no picks: they do so in training only, and training changes nothing else of them."""
    before = [layer.training for layer in layers]
    nn.ModuleList(layers).eval()
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)
