"""A small DiffQKV model with random weights, engines over it, and the slow, obvious way to continue a prompt."""

from dataclasses import replace

import pytest
import torch

from anabranch.adapters.attach import attach
from anabranch.adapters.files import save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import TriAdapt, TriAdaptSettings
from anabranch.models.config import ModelConfig
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.serve.engine import Engine, EngineConfig

CONFIG = ModelConfig(
    family="sigma", vocab_size=97, hidden_size=32, ffn_size=48, layers=2, q_heads=4, k_heads=1, v_heads=2, k_dim=8,
    v_dim=16, max_position=512, eos_ids=(3,), tie_embeddings=True,
)  # fmt: skip
ROOMY = EngineConfig(
    num_blocks=200, block_size=4, max_model_len=120, max_num_seqs=8, max_num_batched_tokens=64,
    cache_dtype=torch.float32,
)  # fmt: skip


KINDS = {
    "lora": lambda r: (RankLora, RankLoraSettings(ranks=r)),
    "smora": lambda r: (RankLora, RankLoraSettings(ranks=r, chosen=2)),
    "experts": lambda r: (RankLora, RankLoraSettings(ranks=r, block=2, chosen=1, gate="softmax_topk")),
    "triadapt": lambda r: (TriAdapt, TriAdaptSettings(initial=r, reference=r, steps=1)),
}


@pytest.fixture(scope="session")
def build():
    """`build(family="mistral", ...)`: the small model, or a variant."""

    def make(**changes):
        # weights larger than before training, so that the most probable tokens vary and stand clear of the others
        return Transformer(replace(CONFIG, **changes)).initialise(torch.Generator().manual_seed(5), std=0.3).eval()

    return make


@pytest.fixture(scope="session")
def write_adapter(build):
    """`write_adapter(folder, kind="smora", seed=3)`: an adapter of the small model that changes its mind."""

    def write(folder, *, kind="lora", seed=0, ranks=4, targets=("*",)):
        random = torch.Generator().manual_seed(seed)
        make, settings = KINDS[kind](ranks)
        adapted = attach(build(), lambda name, i, o: make(i, o, settings, generator=random), targets=targets)
        with torch.no_grad():
            for adapter in adapted.values():
                adapter.b[: settings.ranks if kind != "triadapt" else ranks].normal_(std=0.3, generator=random)
                if kind == "triadapt":
                    adapter.lower[:ranks, :ranks].normal_(generator=random)
        save_adapters(folder, adapted)
        return folder

    return write


@pytest.fixture(scope="session")
def model(build):
    return build()


@pytest.fixture(scope="session")
def dense():
    """Hidden states of all tokens in one pass, nothing cached."""

    def hidden(model, tokens):
        with torch.no_grad():
            return model(torch.tensor(tokens), torch.arange(len(tokens)), DenseAttend(1))

    return hidden


@pytest.fixture(scope="session")
def naive_greedy(dense):
    """Each token from a fresh pass over all tokens before it; no cache, no batch."""

    def generate(model, prompt, count, stop_ids=()):
        tokens = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(model.logits(dense(model, tokens)[-1:]).argmax()))
            if tokens[-1] in stop_ids:
                break
        return tokens[len(prompt) :]

    return generate


@pytest.fixture
def make_engine(model):
    """`make_engine(num_blocks=9, ...)`: an engine over the small model, or over `model=`."""

    def make(model=model, tokenizer=None, **sizes):
        return Engine(model, tokenizer, replace(ROOMY, **sizes))

    return make


@pytest.fixture
def finish():
    """Step until nothing is left; the outputs of ended requests by id."""

    def run(engine, limit=10_000):
        done = {}
        for _ in range(limit):
            if not engine.has_unfinished():
                return done
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
        raise AssertionError(f"not finished after {limit} steps")

    return run
