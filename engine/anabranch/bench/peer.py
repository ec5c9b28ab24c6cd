"""What a whole engine must do to be measured: read prompts, continue them, and say how sure it is of the next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds until every sequence had its first new token, and from there to the last."""

    prefill_s: float
    decode_s: float


class Peer(Protocol):
    """One engine holding the model."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        ...

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Continue all prompts together, each by `new_tokens` tokens, always taking the most probable one."""
        ...
