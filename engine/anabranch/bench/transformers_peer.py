"""transformers as a peer: its own model, cache and SDPA attention, in a loop with less overhead than `generate`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TransformersPeer:
    """AutoModelForCausalLM in bfloat16."""

    name = "transformers"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.tokens = torch.empty(0, 1, dtype=torch.int64)  # [B, 1], the first new tokens
        self.cache: Any = None
        self.context = 0

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        logits: Tensor = self.model(torch.tensor([list(prompt)]), logits_to_keep=1).logits
        return logits[0, -1].float().log_softmax(0)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first new token."""
        start = time.perf_counter()
        self.start([prompt])
        return time.perf_counter() - start

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts into a cache."""
        self.context = len(prompts[0])
        out = self.model(torch.tensor([list(prompt) for prompt in prompts]), use_cache=True, logits_to_keep=1)
        self.tokens, self.cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    @torch.inference_mode()
    def decode(self, new_tokens: int) -> float:
        """Seconds per step; the cache is cut back to the prompts before it starts."""
        surplus = self.cache.get_seq_length() - self.context
        if surplus:
            self.cache.crop(-surplus)
        tokens = self.tokens
        start = time.perf_counter()
        for _ in range(new_tokens):
            out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - start) / new_tokens
