"""Whole engines side by side: a bfloat16 Llama with random weights, the same in every engine, the same prompts in turn.

Prompts to be read are random and never repeat, so that no prefix cache answers for the model.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from anabranch.bench.llama_cpp_peer import LlamaCppPeer, write_gguf
from anabranch.bench.own_peer import OwnPeer
from anabranch.bench.peer import Peer
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
AGREEMENT = 0.08  # of the spread; a dozen bfloat16 layers leave 0.03, other weights 1.4
SETTLE_S = 0.1  # OpenMP threads of one engine spin for some milliseconds after its last call


def save_random_model(config: ModelConfig, folder: Path, *, seed: int = 0) -> None:
    """A bfloat16 model folder with weights as before training: larger ones would amplify every rounding."""
    random = torch.Generator().manual_seed(seed)
    model = Transformer(config).initialise(random, std=config.hidden_size**-0.5)
    save_model(model.bfloat16(), folder)


def measure_prefill(
    peers: Sequence[Peer], config: ModelConfig, roofs: Roofs, *, prompt_tokens: int, repeats: int
) -> list[Sample]:
    """Time to the first new token of every peer in turns, the first being ours; their predictions must agree."""
    prompts = random_prompts(config.vocab_size, prompt_tokens)
    check_agreement(peers, next(prompts))
    runs: list[Callable[[], float]] = [partial(prefill_next, peer, prompts) for peer in peers]
    read_bytes, flops = work(config, batch=1, new_tokens=prompt_tokens, context=0)
    case = f"prefill, {prompt_tokens} tokens"
    return take_turns(peers, runs, roofs, repeats, case=case, read_bytes=read_bytes, flops=flops, tokens=prompt_tokens)


def measure_decode(
    peers: Sequence[Peer], config: ModelConfig, roofs: Roofs, *, batch: int, context: int, new_tokens: int, repeats: int
) -> list[Sample]:
    """Steps of `batch` sequences with `context` cached tokens at first, `new_tokens` steps in a turn."""
    prompts = list(islice(random_prompts(config.vocab_size, context), batch))
    check_agreement(peers, prompts[0])
    for peer in peers:
        peer.start(prompts)
    runs: list[Callable[[], float]] = [partial(peer.decode, new_tokens) for peer in peers]
    read_bytes, flops = work(config, batch=batch, new_tokens=1, context=context + new_tokens // 2)
    case = f"decode, batch {batch}, {context} tokens"
    return take_turns(peers, runs, roofs, repeats, case=case, read_bytes=read_bytes, flops=flops, tokens=batch)


def take_turns(
    peers: Sequence[Peer],
    runs: Sequence[Callable[[], float]],
    roofs: Roofs,
    repeats: int,
    *,
    case: str,
    read_bytes: int,
    flops: int,
    tokens: int,
) -> list[Sample]:
    """One sample of every peer, its run and the read sweep in turns."""
    roof, *results = interleave([roofs.read, *runs], repeats=repeats, warmup=1, settle_s=SETTLE_S)
    return [
        Sample(
            case=case,
            contender=peer.name,
            seconds=tuple(seconds),
            read_bytes=read_bytes,
            flops=flops,
            read_roof=median(roof),
            flops_roof=roofs.flops,
            tokens=tokens,
        )
        for peer, seconds in zip(peers, results, strict=True)
    ]


def random_prompts(vocab_size: int, tokens: int) -> Iterator[list[int]]:
    """Prompts without end, none of which begins like another."""
    random = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(vocab_size, (tokens,), generator=random).tolist()


def prefill_next(peer: Peer, prompts: Iterator[list[int]]) -> float:
    """One sample: nobody has seen the prompt before."""
    return peer.prefill(next(prompts))


def check_agreement(peers: Sequence[Peer], prompt: Sequence[int]) -> None:
    """ValueError names the first peer that expects other tokens after the prompt than we do."""
    ours, *others = peers
    expected = ours.logprobs(prompt)
    spread = (expected - expected.mean()).norm()
    for peer in others:
        distance = float((peer.logprobs(prompt) - expected).norm() / spread)
        if not distance <= AGREEMENT:  # NaN must fail too
            raise ValueError(
                f"{peer.name} and {ours.name} differ in the next token's logarithms by {distance:.2f} of their spread, "
                f"allowed {AGREEMENT}"
            )


def work(config: ModelConfig, *, batch: int, new_tokens: int, context: int) -> tuple[int, int]:
    """Bytes and operations of one pass over `new_tokens` of each of `batch` sequences with `context` cached tokens.

    Every weight is read once, the caches too; two operations per weight and token, and attention's. The output matrix
    serves the last token of each sequence only; it is the embedding too, so its bytes count once.
    """
    head = config.vocab_size * config.hidden_size
    body = count_weights(config) - head
    read_bytes = 2 * (body + head) + batch * context * config.cache_bytes_per_token(2, 2)
    attention = 2 * config.layers * config.q_heads * (config.k_dim + config.v_dim) * (context + new_tokens / 2)
    return read_bytes, round(batch * (new_tokens * (2 * body + attention) + 2 * head))


def count_weights(config: ModelConfig) -> int:
    """Elements of all matrices and vectors."""
    return sum(parameter.numel() for parameter in Transformer(config, device="meta").parameters())


@contextmanager
def open_peers(
    config: ModelConfig, wanted: Sequence[str], *, batch: int, length: int, threads: int
) -> Iterator[tuple[list[Peer], list[str]]]:
    """Ours and the wanted peers on equal weights, with room for the batch; and why others are absent."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-bench-")))
        save_random_model(config, folder)
        peers: list[Peer] = [OwnPeer(folder, batch=batch, length=length)]
        absent = []
        if "transformers" in wanted:
            peers.append(TransformersPeer(folder))
        if "llama.cpp" in wanted:
            path = folder / "model.gguf"
            try:
                write_gguf(folder, path)
                llama = LlamaCppPeer(path, batch=batch, length=length, threads=threads)
                peers.append(stack.enter_context(closing(llama)))
            except ImportError as error:
                absent.append(f"llama.cpp: {error}; pip install llama-cpp-python gguf")
        yield peers, absent
