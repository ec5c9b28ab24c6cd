"""Inference and aggregation with compiled kernels. `from anabranch import LLM, SamplingParams` is the way in."""

from importlib import import_module
from typing import TYPE_CHECKING

from anabranch.version import __version__

if TYPE_CHECKING:
    from anabranch.aggregate.job import aggregate_files, aggregate_tensors
    from anabranch.aggregate.settings import AggregateMethod, AggregateOptions
    from anabranch.serve.llm import LLM
    from anabranch.serve.request import SamplingParams
    from anabranch.serve.structured import StructuredOutput

__all__ = [
    "LLM",
    "AggregateMethod",
    "AggregateOptions",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
    "aggregate_files",
    "aggregate_tensors",
]

_HOMES = {  # loaded on first use (PEP 562)
    "AggregateMethod": "anabranch.aggregate.settings",
    "AggregateOptions": "anabranch.aggregate.settings",
    "LLM": "anabranch.serve.llm",
    "SamplingParams": "anabranch.serve.request",
    "StructuredOutput": "anabranch.serve.structured",
    "aggregate_files": "anabranch.aggregate.job",
    "aggregate_tensors": "anabranch.aggregate.job",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
