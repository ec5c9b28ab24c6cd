"""Inference and aggregation with compiled kernels. `from anabranch import LLM, SamplingParams` is the way in."""

from importlib import import_module
from typing import TYPE_CHECKING

from anabranch.version import __version__

if TYPE_CHECKING:
    from anabranch.serve.llm import LLM
    from anabranch.serve.request import SamplingParams
    from anabranch.serve.structured import StructuredOutput

__all__ = ["LLM", "SamplingParams", "StructuredOutput", "__version__"]

_HOMES = {  # loaded on first use (PEP 562)
    "LLM": "anabranch.serve.llm",
    "SamplingParams": "anabranch.serve.request",
    "StructuredOutput": "anabranch.serve.structured",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
