"""Whole engines side by side: a bfloat16 Llama with random weights, the same in every engine, the same prompts in turn.

Prompts are random and never repeat, so that no prefix cache answers for the model.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from anabranch.bench.llama_cpp_peer import LlamaCppPeer, write_gguf
from anabranch.bench.own_peer import OwnPeer
from anabranch.bench.peer import Peer, Times
from anabranch.bench.timing import Roofs, Sample, interleave
from anabranch.bench.transformers_peer import TransformersPeer
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import Transformer
from anabranch.models.weights import save_model

LLAMA_315M = ModelConfig(
    family="llama", vocab_size=8192, hidden_size=1536, ffn_size=4096, layers=12, q_heads=24, k_heads=8, v_heads=8,
    k_dim=64, v_dim=64, max_position=2048, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
TINY = ModelConfig(
    family="llama", vocab_size=512, hidden_size=64, ffn_size=96, layers=2, q_heads=4, k_heads=2, v_heads=2,
    k_dim=32, v_dim=32, max_position=2048, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
LIKELIEST = 20  # tokens whose log-probabilities are compared
AGREEMENT = 0.1  # in nats: a dozen bfloat16 layers, each rounding its own way
SETTLE_S = 0.1  # OpenMP threads of one engine spin for some milliseconds after its last call


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sequences decoded together, tokens of each prompt, tokens that follow."""

    batch: int
    prompt: int = 512
    new_tokens: int = 16


def save_random_model(config: ModelConfig, folder: Path, *, seed: int = 0) -> None:
    """A bfloat16 model folder; weights as before training, only larger, so that tokens differ in probability."""
    random = torch.Generator().manual_seed(seed)
    save_model(Transformer(config).initialise(random, std=0.05).bfloat16(), folder)


def measure_load(peers: Sequence[Peer], config: ModelConfig, load: Load, roofs: Roofs, *, repeats: int) -> list[Sample]:
    """Prefill and decode of every peer in turns, the first being ours; the peers' predictions must agree."""
    prompts = random_prompts(config.vocab_size, load)
    check_agreement(peers, next(prompts)[0])
    runs: list[Callable[[], Times | float]] = [roofs.read]
    for peer in peers:
        runs.append(partial(generate_next, peer, prompts, load.new_tokens))
    roof, *results = interleave(runs, repeats=repeats, warmup=1, settle_s=SETTLE_S)
    read_roof = median(value for value in roof if isinstance(value, float))
    samples = []
    for phase in ("prefill", "decode"):
        for peer, times in zip(peers, results, strict=True):
            seconds = [seconds_of(phase, result, load) for result in times if isinstance(result, Times)]
            samples.append(
                make_sample(phase, peer.name, seconds, config, load, read_roof=read_roof, flops_roof=roofs.flops)
            )
    return samples


def random_prompts(vocab_size: int, load: Load) -> Iterator[list[list[int]]]:
    """Batches of prompts without end."""
    random = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(vocab_size, (load.batch, load.prompt), generator=random).tolist()


def generate_next(peer: Peer, prompts: Iterator[list[list[int]]], new_tokens: int) -> Times:
    """One sample of one peer."""
    return peer.generate(next(prompts), new_tokens)


def check_agreement(peers: Sequence[Peer], prompt: Sequence[int]) -> None:
    """ValueError names the first peer that gives our likeliest next tokens other probabilities."""
    ours, *others = peers
    expected, tokens = ours.logprobs(prompt).topk(LIKELIEST)
    for peer in others:
        distance = float((peer.logprobs(prompt)[tokens] - expected).abs().max())
        if not distance <= AGREEMENT:
            raise ValueError(
                f"{peer.name} and {ours.name} differ by {distance:.2f} in a log-probability, allowed {AGREEMENT}"
            )


def seconds_of(phase: str, times: Times, load: Load) -> float:
    """Seconds of the whole prefill, or of one decode step."""
    return times.prefill_s if phase == "prefill" else times.decode_s / (load.new_tokens - 1)


def make_sample(
    phase: str,
    name: str,
    seconds: Sequence[float],
    config: ModelConfig,
    load: Load,
    *,
    read_roof: float,
    flops_roof: float,
) -> Sample:
    """Bytes: every weight once and, when decoding, the caches. Operations: two per weight and token, and attention.

    The output matrix serves the last token of each sequence only; it is the embedding, so its bytes count once.
    """
    head = config.vocab_size * config.hidden_size
    body = count_weights(config) - head
    context = load.prompt + load.new_tokens // 2
    tokens = load.batch * (load.prompt if phase == "prefill" else 1)
    seen = load.prompt / 2 if phase == "prefill" else context
    attention = 2 * config.layers * config.q_heads * (config.k_dim + config.v_dim) * seen
    cached = 0 if phase == "prefill" else load.batch * context * config.cache_bytes_per_token(2, 2)
    return Sample(
        case=f"{phase}, batch {load.batch}, {load.prompt} tokens",
        contender=name,
        seconds=tuple(seconds),
        read_bytes=2 * (body + head) + cached,
        flops=round(tokens * (2 * body + attention) + load.batch * 2 * head),
        read_roof=read_roof,
        flops_roof=flops_roof,
        tokens=tokens,
    )


def count_weights(config: ModelConfig) -> int:
    """Elements of all matrices and vectors."""
    return sum(parameter.numel() for parameter in Transformer(config, device="meta").parameters())


@contextmanager
def open_peers(
    config: ModelConfig, wanted: Sequence[str], load: Load, threads: int
) -> Iterator[tuple[list[Peer], list[str]]]:
    """Ours and the wanted peers on the same weights, and a reason for each that is not installed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-bench-")))
        save_random_model(config, folder)
        peers: list[Peer] = [OwnPeer(folder, batch=load.batch, length=load.prompt + load.new_tokens)]
        absent = []
        if "transformers" in wanted:
            peers.append(TransformersPeer(folder))
        if "llama.cpp" in wanted:
            try:
                peers.append(stack.enter_context(closing(open_llama_cpp(folder, load, threads))))
            except ImportError as error:
                absent.append(f"llama.cpp: {error}; pip install llama-cpp-python gguf")
        yield peers, absent


def open_llama_cpp(folder: Path, load: Load, threads: int) -> LlamaCppPeer:
    """The folder's weights in llama.cpp; ImportError names what is not installed."""
    write_gguf(folder, folder / "model.gguf")
    length = load.prompt + load.new_tokens
    return LlamaCppPeer(folder / "model.gguf", batch=load.batch, length=length, threads=threads)
