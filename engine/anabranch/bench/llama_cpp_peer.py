"""llama.cpp as a peer, through llama-cpp-python's plain C calls: the same weights in a GGUF file, without a sampler."""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.common.checkpoint import Checkpoint
from anabranch.models.config import ModelConfig

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama folder as one bfloat16 GGUF file without a vocabulary; vectors stay float32, as llama.cpp wants them."""
    import gguf

    config = ModelConfig.load(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.q_heads)
    writer.add_head_count_kv(config.k_heads)
    writer.add_key_length(config.k_dim)
    writer.add_value_length(config.v_dim)
    writer.add_rope_dimension_count(config.k_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    checkpoint = Checkpoint(folder)
    for name in checkpoint.shapes:
        tensor = checkpoint.read(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_rotary(tensor, config.k_dim)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """`blk.0.attn_q.weight` for model.layers.0.self_attn.q_proj.weight."""
    if name in NAMES:
        return NAMES[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def interleave_rotary(weight: Tensor, width: int) -> Tensor:
    """llama.cpp turns neighbouring rows (0, 1), Hugging Face's checkpoints rows half a head apart."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class LlamaCppPeer:
    """llama.cpp on a GGUF file, with room for `batch` sequences of `length` tokens. It must be closed."""

    name = "llama.cpp"

    def __init__(self, path: Path, *, batch: int, length: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._keep_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._keep_quiet, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * length, batch
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise ValueError(f"llama.cpp cannot open {path}")
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.tokens: list[int] = []  # the first new token of each sequence
        self.context_tokens = 0
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities of every token after `prompt`: [vocab_size]."""
        self._clear()
        return self._read_prompt(prompt, 0).log_softmax(0)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first new token."""
        start = time.perf_counter()
        self.start([prompt])
        return time.perf_counter() - start

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts into the cache, one sequence each."""
        self._clear()
        self.context_tokens = len(prompts[0])
        self.tokens = [int(self._read_prompt(prompt, sequence).argmax()) for sequence, prompt in enumerate(prompts)]

    def decode(self, new_tokens: int) -> float:
        """Seconds per step; the cache is cut back to the prompts before it starts."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), -1, self.context_tokens, -1)
        tokens = self.tokens
        start = time.perf_counter()
        for step in range(new_tokens):
            entries = [(token, self.context_tokens + step, sequence) for sequence, token in enumerate(tokens)]
            tokens = [int(logits.argmax()) for logits in self._decode(entries, range(len(entries)))]
        return (time.perf_counter() - start) / new_tokens

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _read_prompt(self, prompt: Sequence[int], sequence: int) -> Tensor:
        """Feed a prompt in batches of 512; the logits after it."""
        logits = []
        for first in range(0, len(prompt), 512):
            entries = [(token, first + i, sequence) for i, token in enumerate(prompt[first : first + 512])]
            last = first + len(entries) == len(prompt)
            logits = self._decode(entries, [len(entries) - 1] if last else [])
        return logits[0]

    def _decode(self, entries: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> list[Tensor]:
        """Feed (token, position, sequence); logits [vocab_size] of the `wanted` entries."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise ValueError(f"llama.cpp could not decode {len(entries)} tokens, status {status}")
        return [self._logits(i) for i in wanted]

    def _logits(self, index: int) -> Tensor:
        pointer = self.api.llama_get_logits_ith(self.context, index)
        array = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return torch.frombuffer(bytearray(array), dtype=torch.float32)
