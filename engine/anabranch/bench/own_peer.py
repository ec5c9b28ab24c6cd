"""Our engine as a peer, through the public `LLM`, as anybody would call it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anabranch import LLM, SamplingParams
from anabranch.bench.peer import Times


class OwnPeer:
    """An LLM with room for `batch` sequences of `length` tokens."""

    name = "anabranch"

    def __init__(self, folder: Path, *, batch: int, length: int) -> None:
        self.llm = LLM(folder, dtype="bfloat16", device="cpu", max_model_len=length, max_num_seqs=batch)

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        (request,) = self.llm.generate([list(prompt)], params, use_tqdm=False)
        position = (request.outputs[0].logprobs or [{}])[0]
        return torch.tensor([position[token].logprob for token in range(len(position))])

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Seconds until every prompt had its first new token, and for the steps after it.

        Two calls: were it one, the first sequences would decode while the last prompts are still read. The second finds
        the prompts in the prefix cache, so all sequences start together.
        """
        inputs = [list(prompt) for prompt in prompts]
        first = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        self.llm.generate(inputs, first, use_tqdm=False)
        prefill_s = time.perf_counter() - start
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        requests = self.llm.generate(inputs, params, use_tqdm=False)
        end = time.perf_counter()
        return Times(prefill_s=prefill_s, decode_s=end - max(one.metrics.first_token_s or end for one in requests))
