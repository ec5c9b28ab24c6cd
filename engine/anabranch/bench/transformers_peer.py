"""transformers as a peer: its own model, cache and SDPA attention, in a loop with less overhead than `generate`."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anabranch.bench.peer import Times


class TransformersPeer:
    """AutoModelForCausalLM in bfloat16."""

    name = "transformers"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model.eval()

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        logits: Tensor = self.model(torch.tensor([list(prompt)]), logits_to_keep=1).logits
        return logits[0, -1].float().log_softmax(0)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Seconds for the prompts and for the steps after the first new token."""
        tokens, cache = torch.tensor([list(prompt) for prompt in prompts]), None
        times = [time.perf_counter()]
        for _ in range(new_tokens):
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            times.append(time.perf_counter())
        return Times(prefill_s=times[1] - times[0], decode_s=times[-1] - times[1])
