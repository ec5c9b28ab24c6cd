"""What adapters cost a whole engine: the same batch without, with one for all, and with many mixed, in turns.

The engine without adapters was made without them. Every adapter stands beside all linear layers. Before anything is
timed, the next token's logarithms in a mixed batch are compared with those of the plain model with an adapter attached.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import anabranch
from anabranch import LLM, SamplingParams
from anabranch.adapters.attach import attach, detach
from anabranch.adapters.files import load_adapters, save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.bench.engine import AGREEMENT, random_prompts, save_random_model, take_turns, work
from anabranch.bench.own_peer import OwnPeer
from anabranch.bench.timing import Roofs, Sample
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend
from anabranch.models.weights import load_model

SHIPPED = Path(anabranch.__file__).parent / "assets" / "pystdlib-diffqkv"
# In bfloat16 ranks at the border of the k best go in and out by rounding; random routers have many there.
ROUTED_AGREEMENT = 0.25
CONTEXT = 65  # tokens of a prompt: one block, which is cached, and one more


class AdaptedPeer(OwnPeer):
    """An engine whose prompt i has the adapter names[i % len(names)]."""

    def __init__(self, name: str, llm: LLM, names: Sequence[str | None]) -> None:
        self.name = name
        self.llm = llm
        self.names = names
        self.prompts: list[list[int]] = []

    def logprobs(self, prompt: Sequence[int]) -> Tensor:
        """Of every token after the prompt, by the first adapter in a batch with all of them: [vocab_size]."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
        prompts = [list(prompt)] * len(self.names)
        first, *_ = self.llm.generate(prompts, params, adapter=self.names, use_tqdm=False)
        position = (first.outputs[0].logprobs or [{}])[0]
        return torch.tensor([position[token].logprob for token in range(len(position))])

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        names = [self.names[index % len(self.names)] for index in range(len(prompts))]
        requests = self.llm.generate(prompts, params, adapter=names, use_tqdm=False)
        return max(request.metrics.first_token_s or 0.0 for request in requests)


def measure_adapters(
    config: ModelConfig | None, roofs: Roofs, *, batch: int, adapters: int, new_tokens: int, repeats: int
) -> list[Sample]:
    """Decoding with the package's model, or with one of random weights: `adapters` of each kind, LoRA and SMoRA."""
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as name:
        root = Path(name)
        folder = SHIPPED
        if config is not None:
            folder = root / "model"
            save_random_model(config, folder)
        kinds = {"LoRA 16": RankLoraSettings(ranks=16), "SMoRA 8 of 64": RankLoraSettings(ranks=64, chosen=8)}
        folders = write_adapters(folder, root, kinds, adapters)
        open_llm: Callable[..., LLM] = partial(
            LLM, folder, max_model_len=CONTEXT + new_tokens + 1, max_num_seqs=2 * batch, device="cpu"
        )
        adapted = open_llm(adapters=folders)
        mixed = {kind: [one for one in folders if one.startswith(kind)] for kind in kinds}
        lora, *_ = kinds
        peers = [AdaptedPeer("no adapters", open_llm(), [None]), AdaptedPeer(f"one {lora}", adapted, mixed[lora][:1])]
        peers += [AdaptedPeer(f"{adapters} {kind}, mixed", adapted, names) for kind, names in mixed.items()]
        model = adapted.engine.runner.model.config
        prompts = list(islice(random_prompts(model.vocab_size, CONTEXT), batch))
        for peer in peers[1:]:
            allowed = ROUTED_AGREEMENT if "SMoRA" in peer.name else AGREEMENT
            check_against_the_model(peer, folder, folders[peer.names[0] or ""], prompts[0], allowed=allowed)
        for peer in peers:
            peer.start(prompts)
        runs: list[Callable[[], float]] = [partial(peer.decode, new_tokens) for peer in peers]
        read_bytes, flops = work(model, batch=batch, new_tokens=1, context=CONTEXT + new_tokens // 2)
        case = f"{'package model' if config is None else f'{model.family} of {model.hidden_size}'}, batch {batch}"
        return take_turns(peers, runs, roofs, repeats, case=case, read_bytes=read_bytes, flops=flops, tokens=batch)


def write_adapters(folder: Path, root: Path, kinds: dict[str, RankLoraSettings], count: int) -> dict[str, Path]:
    """So many folders of each kind, with random weights small enough to leave the model one."""
    model, found = load_model(folder), {}
    for kind, settings in kinds.items():
        for number in range(count):
            random = torch.Generator().manual_seed(number)
            dtype = model.embed.dtype
            adapted = attach(model, partial(_named, settings=settings, dtype=dtype, generator=random))
            for layer in adapted.values():
                torch.nn.init.normal_(layer.get_parameter("b"), std=0.02, generator=random)
            found[f"{kind} {number}"] = root / f"{kind} {number}"
            save_adapters(found[f"{kind} {number}"], adapted)
            detach(model)
    return found


def _named(
    name: str, inputs: int, outputs: int, settings: RankLoraSettings, dtype: torch.dtype, generator: torch.Generator
) -> RankLora:
    return RankLora(inputs, outputs, settings, dtype=dtype, generator=generator)


def check_against_the_model(
    peer: AdaptedPeer, folder: Path, adapter: Path, prompt: list[int], *, allowed: float = AGREEMENT
) -> None:
    """ValueError if the engine expects other tokens than the model with the adapter attached."""
    model = load_model(folder)
    load_adapters(model, adapter)
    with torch.no_grad():
        hidden = model(torch.tensor(prompt), torch.arange(len(prompt)), DenseAttend(1))
        expected = model.logits(hidden[-1:])[0].log_softmax(0)
    distance = float((peer.logprobs(prompt) - expected).norm() / (expected - expected.mean()).norm())
    if not distance <= allowed:  # NaN must fail too
        raise ValueError(f"{peer.name}: logarithms are {distance:.2f} of their spread from the model's, {allowed=}")
