"""How an op of this package becomes a torch op: one function."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("anabranch", "DEF")


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Register `schema` in the torch namespace `anabranch` and return the op.

    torch's dispatcher picks `cpu` or `cuda` by the tensors' device; any other device gets `reference`. `fake` tells
    shapes and dtypes to torch.compile. Ops defined here have no autograd formula: the ones that train wrap the op in a
    `torch.autograd.Function`, which costs 7 µs a call where `register_autograd` costs 11.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"anabranch::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.anabranch, name).default
    return op
