"""Our engine as a peer, through the public `LLM`, as anybody would call it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anabranch import LLM, SamplingParams
from anabranch.bench.peer import Times


class OwnPeer:
    """An LLM that has room for sequences of `length` tokens."""

    name = "anabranch"

    def __init__(self, folder: Path, *, length: int) -> None:
        self.llm = LLM(str(folder), dtype="bfloat16", device="cpu", max_model_len=length)

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        (request,) = self.llm.generate([list(prompt)], params, use_tqdm=False)
        position = (request.outputs[0].logprobs or [{}])[0]
        return torch.tensor([position[token].logprob for token in range(len(position))])

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Seconds until every prompt had its first new token, and for the steps after it."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        requests = self.llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
        end = time.perf_counter()
        prefilled = max(request.metrics.first_token_s or end for request in requests)
        return Times(prefill_s=prefilled - start, decode_s=end - prefilled)
