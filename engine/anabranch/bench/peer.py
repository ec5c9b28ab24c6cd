"""What a whole engine must do to be measured: read prompts, go on from them, say what it expects to come next."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Peer(Protocol):
    """One engine holding the model."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        ...

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first new token of a prompt that the engine has not seen before."""
        ...

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts of equal length, from which `decode` goes on."""
        ...

    def decode(self, new_tokens: int) -> float:
        """Seconds per step of continuing them together by the likeliest tokens; the next call starts anew."""
        ...
