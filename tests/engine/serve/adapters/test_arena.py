"""Adapters served together, against each alone on the model and against merged weights."""

import pytest
import torch
from torch.testing import assert_close

from anabranch import LLM, SamplingParams
from anabranch.adapters.attach import attach, linear_layers, merge
from anabranch.adapters.files import load_adapters, save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.models.weights import load_model, save_model
from anabranch.serve.adapters.arena import bytes_per_rank

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=-1)
KINDS = ("lora", "smora", "experts", "triadapt")
PROMPTS = [[5, 17, 40, 8, 9, 3, 22], [60, 61], list(range(20, 41)), [7], [90, 4, 4, 31, 2]]
# float32 through two layers, branches and products summed in another order: some 1e-6 of values of order ten
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def folder(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(build(), path)
    return path


@pytest.fixture(scope="module")
def adapters(write_adapter, tmp_path_factory):
    """One of each kind, with ranks of their own, some beside a few layers only."""
    root = tmp_path_factory.mktemp("adapters")
    targets = {"lora": ["*"], "smora": ["*"], "experts": ["q_proj", "up_proj"], "triadapt": ["v_proj", "down_proj"]}
    return {
        kind: write_adapter(root / kind, kind=kind, seed=seed, ranks=4 + 2 * seed, targets=targets[kind])
        for seed, kind in enumerate(KINDS)
    }


@pytest.fixture(scope="module")
def all_prompts():
    return [prompt for prompt in PROMPTS for _ in (None, *KINDS)]


@pytest.fixture(scope="module")
def all_names():
    return [name for _ in PROMPTS for name in (None, *KINDS)]


def scores(output):
    """[tokens, vocab] log-probabilities of an output's positions."""
    positions = output.outputs[0].logprobs
    return torch.tensor([[position[token].logprob for token in range(len(position))] for position in positions])


def forced(model, dense, prompt, tokens):
    """The same for given tokens, in one dense pass."""
    with torch.no_grad():
        logits = model.logits(dense(model, prompt + tokens[:-1]))
    return logits[len(prompt) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("sizes", [{}, {"max_num_batched_tokens": 25, "max_num_seqs": 25, "block_size": 4}], ids=len)
def test_a_mixed_batch_is_each_adapter_on_the_model_alone(folder, adapters, all_prompts, all_names, dense, sizes):
    outputs = LLM(folder, adapters=adapters, **sizes).generate(all_prompts, SCORED, adapter=all_names)
    for name in (None, *KINDS):
        model = load_model(folder)
        if name is not None:
            load_adapters(model, adapters[name])
        mine = [output for output, whose in zip(outputs, all_names, strict=True) if whose == name]
        for prompt, output in zip(PROMPTS, mine, strict=True):
            tokens = output.outputs[0].token_ids
            assert_close(scores(output), forced(model, dense, prompt, tokens), **CLOSE)
    kinds = {name: outputs[index].outputs[0].token_ids for index, name in enumerate((None, *KINDS))}
    assert len(set(map(tuple, kinds.values()))) == len(kinds)  # every adapter says something else


def test_a_request_is_the_same_alone_as_in_a_mixed_batch(folder, adapters, all_prompts, all_names):
    llm = LLM(folder, adapters=adapters)
    together = llm.generate(all_prompts, SCORED, adapter=all_names)
    for prompt, name, output in zip(all_prompts, all_names, together, strict=True):
        llm.reset_prefix_cache()
        (alone,) = llm.generate([prompt], SCORED, adapter=name)
        assert_close(scores(alone), scores(output), **CLOSE)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
    backwards = llm.generate(all_prompts[::-1], SCORED, adapter=all_names[::-1])[::-1]
    assert [o.outputs[0].token_ids for o in backwards] == [o.outputs[0].token_ids for o in together]


def test_lora_is_what_merging_makes_of_the_weights(folder, adapters, dense):
    outputs = LLM(folder, adapters=adapters).generate(PROMPTS, SCORED, adapter="lora")
    model = load_model(folder)
    load_adapters(model, adapters["lora"])
    merge(model)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert_close(scores(output), forced(model, dense, prompt, output.outputs[0].token_ids), **CLOSE)


def test_without_an_adapter_every_bit_is_as_without_adapters(folder, adapters):
    plain, llm = LLM(folder), LLM(folder, adapters=adapters)
    llm.generate(PROMPTS, GREEDY, adapter="smora")
    want, got = plain.generate(PROMPTS, SCORED), llm.generate(PROMPTS, SCORED)
    assert all(torch.equal(scores(a), scores(b)) for a, b in zip(want, got, strict=True))


def test_cached_prompts_are_those_of_the_same_adapter(folder, adapters):
    llm = LLM(folder, adapters=adapters, block_size=4)
    hits = [
        llm.generate([PROMPTS[2]], GREEDY, adapter=name)[0].num_cached_tokens
        for name in (None, "lora", "smora", "lora", None)
    ]
    assert hits == [0, 0, 0, 20, 20]
    llm.load_adapter("lora", adapters["triadapt"], replace=True)
    assert llm.generate([PROMPTS[2]], GREEDY, adapter="lora")[0].num_cached_tokens == 0


@pytest.mark.parametrize("room", [10, 17, 40])
@pytest.mark.parametrize("host_bytes", [0, 1 << 30])
def test_adapters_that_come_and_go_say_the_same(folder, adapters, all_prompts, all_names, room, host_bytes):
    params = [GREEDY] * len(all_names)
    want = LLM(folder, adapters=adapters).generate(all_prompts, params, adapter=all_names)
    rank_bytes = bytes_per_rank(linear_layers(load_model(folder)))
    llm = LLM(folder, adapters=adapters, adapter_bytes=room * rank_bytes, adapter_host_bytes=host_bytes)
    got = llm.generate(all_prompts, params, adapter=all_names)
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in want]
    assert (llm.engine.adapter_slots.evictions > 0) == (room < 28)  # 4 + 6 + 8 + 10 ranks
    assert llm.adapters.kept_bytes <= host_bytes


def test_two_hundred_adapters_over_room_for_eight(folder, write_adapter, tmp_path):
    folders = {
        str(n): write_adapter(tmp_path / str(n), seed=n, ranks=2, targets=["layers.0.self_attn.*"]) for n in range(200)
    }
    rank_bytes = bytes_per_rank(linear_layers(load_model(folder)))
    llm = LLM(folder, adapters=folders, adapter_bytes=16 * rank_bytes, adapter_host_bytes=40_000)
    prompts, params = [[5, 17, 40]] * 200, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    got = llm.generate(prompts, params, adapter=list(folders))
    assert llm.engine.adapter_slots.evictions >= 192
    assert len(llm.engine.adapter_slots.residents) <= 8
    roomy = LLM(folder, adapters=folders).generate(prompts, params, adapter=list(folders))
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in roomy]
    assert len({tuple(o.outputs[0].token_ids) for o in got}) > 50


def test_a_step_that_fails_while_it_loads_leaves_nothing_behind(folder, adapters):
    llm = LLM(folder, adapters=adapters)
    want = llm.generate(PROMPTS, GREEDY, adapter="lora")
    llm = LLM(folder, adapters=adapters)
    arena = llm.engine.runner.adapters
    load, arena.load = arena.load, lambda load: 1 / 0
    with pytest.raises(RuntimeError, match="5 of 5 requests failed; the first: ZeroDivisionError"):
        llm.generate(PROMPTS, GREEDY, adapter="lora")
    assert not llm.engine.adapter_slots.residents
    arena.load = load
    got = llm.generate(PROMPTS, GREEDY, adapter="lora")
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]


def test_slots_beyond_the_first_few_and_ranks_of_all_sizes(folder, write_adapter, tmp_path, dense):
    folders = {str(n): write_adapter(tmp_path / str(n), seed=n, ranks=1 + n % 5, kind="lora") for n in range(20)}
    outputs = LLM(folder, adapters=folders).generate([[5, 17]] * 20, SCORED, adapter=list(folders))
    for name, output in zip(folders, outputs, strict=True):
        model = load_model(folder)
        load_adapters(model, folders[name])
        assert_close(scores(output), forced(model, dense, [5, 17], output.outputs[0].token_ids), **CLOSE)


def test_augmented_queries_and_biases_are_adapted_too(build, tmp_path, dense):
    changes = {"q_intermediate_size": 12, "augq_residual": True}
    save_model(build(**changes), tmp_path / "model")
    adapted = attach(build(**changes), lambda name, i, o: RankLora(i, o, RankLoraSettings(ranks=3)))
    for number, adapter in enumerate(adapted.values()):
        torch.nn.init.normal_(adapter.b, std=0.3, generator=torch.Generator().manual_seed(number))
    save_adapters(tmp_path / "adapter", adapted)
    (output,) = LLM(tmp_path / "model", adapters={"a": tmp_path / "adapter"}).generate([[5, 17]], SCORED, adapter="a")
    model = load_model(tmp_path / "model")
    assert len(load_adapters(model, tmp_path / "adapter")) == 20
    assert_close(scores(output), forced(model, dense, [5, 17], output.outputs[0].token_ids), **CLOSE)
