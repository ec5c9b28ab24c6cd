"""Our engine as a peer, through the public `LLM`, as anybody would call it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anabranch import LLM, SamplingParams


class OwnPeer:
    """An LLM with room for `batch` sequences of `length` tokens."""

    name = "anabranch"

    def __init__(self, folder: Path, *, batch: int, length: int) -> None:
        # Room for twice the batch: prompts stay in the prefix cache while their continuations come and go.
        self.llm = LLM(folder, dtype="bfloat16", device="cpu", max_model_len=length, max_num_seqs=2 * batch)
        self.prompts: list[list[int]] = []

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        (request,) = self.llm.generate([list(prompt)], params, use_tqdm=False)
        position = (request.outputs[0].logprobs or [{}])[0]
        return torch.tensor([position[token].logprob for token in range(len(position))])

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first new token."""
        start = time.perf_counter()
        self._generate([list(prompt)], 1)
        return time.perf_counter() - start

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Put the prompts into the prefix cache."""
        self.prompts = [list(prompt) for prompt in prompts]
        self._generate(self.prompts, 1)

    def decode(self, new_tokens: int) -> float:
        """Seconds per step, counted from the moment when every sequence has its first token."""
        first = self._generate(self.prompts, new_tokens + 1)
        return (time.perf_counter() - first) / new_tokens

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Run to the end; when the last sequence had its first token."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        requests = self.llm.generate(prompts, params, use_tqdm=False)
        return max(request.metrics.first_token_s or 0.0 for request in requests)
