"""`LLM` over a model of 260 000 parameters that was really trained, and over a small one with random weights."""

import json
import shutil

import pytest
import torch

from anabranch import LLM, SamplingParams
from anabranch.models.weights import save_model
from anabranch.serve.llm import RequestError
from anabranch.train.tokenizer import write_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=200)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def stories(data):
    return data("stories260k")


@pytest.fixture(scope="session")
def expected(stories):
    return json.loads((stories / "expected_greedy.json").read_text())


@pytest.fixture(scope="session")
def folder(build, tmp_path_factory):
    """A byte model: random weights, a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    save_model(build(vocab_size=258, eos_ids=()), path)
    write_tokenizer(path, context=512)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=16)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"block_size": 16}, {"max_num_seqs": 2, "max_num_batched_tokens": 3, "block_size": 4}],
    ids=["default", "other-blocks", "small-steps"],
)
def test_a_trained_model_gives_its_200_tokens(stories, expected, sizes):
    llm = LLM(stories, **sizes)
    (result,) = llm.generate([[expected["bos"]]], GREEDY)
    assert result.prompt_token_ids + result.outputs[0].token_ids == expected["ids"]
    assert result.outputs[0].text == expected["text"]
    assert result.outputs[0].finish_reason == "length"


def test_the_200_tokens_survive_preemption_and_chunks(stories, expected):
    block = 8 * 5 * 2 * 4 * 8 * 4  # bytes: tokens, layers, K and V, heads, width, float32
    tight = LLM(
        stories, cache_bytes=14 * block, block_size=8, max_model_len=110, max_num_batched_tokens=11, max_num_seqs=4
    )
    starts = [1, 12, 23, 34, 45, 56, 67, 78]
    ids = expected["ids"]
    results = tight.generate([ids[:start] for start in starts], SamplingParams(temperature=0, max_tokens=30))
    assert [result.outputs[0].token_ids for result in results] == [ids[start : start + 30] for start in starts]
    assert tight.engine.scheduler.preemptions > 0


def test_a_text_is_continued_and_streamed(stories, expected):
    llm = LLM(stories, dtype="float32")
    (result,) = llm.generate("", GREEDY)  # the tokenizer puts the start token before any text
    assert result.outputs[0].text == expected["text"]
    start = "Once upon a time, there was a"
    pieces = [part.text for part in llm.stream(start, SamplingParams(temperature=0, max_tokens=150, stop="lea"))]
    assert len(pieces) > 20
    rest = expected["text"][len(start) :]
    assert rest.startswith("".join(pieces))
    (result,) = llm.generate(start, SamplingParams(temperature=0, max_tokens=150))
    assert result.outputs[0].text == rest[: len(result.outputs[0].text)]
    (result,) = llm.generate(start, SamplingParams(temperature=0, max_tokens=150, stop=["Lily"]))
    assert start + result.outputs[0].text == expected["text"].split("Lily")[0]
    assert result.outputs[0].stop_reason == "Lily"


def test_prompts_of_every_kind(llm):
    ids = list(b"import os")
    params = SamplingParams(temperature=0, max_tokens=5)
    kinds = ["import os", ids, tuple(ids), torch.tensor(ids), {"prompt": "import os"}, {"prompt_token_ids": ids}]
    results = llm.generate(kinds, params)
    assert len({tuple(result.outputs[0].token_ids) for result in results}) == 1
    assert [result.prompt for result in results] == ["import os", None, None, None, "import os", None]
    for single in ("import os", ids, {"prompt": "import os", "cache_salt": "mine"}):
        (result,) = llm.generate(single, params)
        assert result.prompt_token_ids == ids
    assert llm.generate([], params) == []
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 16


def test_each_prompt_may_have_its_own_parameters(llm):
    results = llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3, n=2)])
    assert [[len(o.token_ids) for o in result.outputs] for result in results] == [[2], [3, 3]]
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(ValueError, match="sampling_params must be SamplingParams, or a list of them"):
        llm.generate("a", {"max_tokens": 3})


def test_a_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    (chat,) = llm.chat(messages, params)
    assert chat.prompt == "<user>hello<assistant>"
    (plain,) = llm.generate("<user>hello<assistant>", params)
    assert chat.outputs[0].token_ids == plain.outputs[0].token_ids
    assert len(llm.chat([messages, messages], params)) == 2
    assert llm.encode_chat(messages) == list(b"<user>hello<assistant>")


def test_streams_and_batches_may_interleave(llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    alone = ["".join(part.text for part in llm.stream(text, params)) for text in ("one", "two")]
    first, second = llm.stream("one", params), llm.stream("two", params)
    texts = [next(first).text, next(second).text]
    (batch,) = llm.generate("two", params)
    for part in first:
        texts[0] += part.text
    for part in second:
        texts[1] += part.text
    assert texts == alone
    assert batch.outputs[0].text == alone[1]


def test_a_closed_stream_frees_its_blocks(llm):
    stream = llm.stream("one", SamplingParams(max_tokens=100))
    next(stream)
    pool = llm.engine.scheduler.pool
    assert pool.num_free < pool.num_blocks
    stream.close()
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_unfinished()


def test_samples_in_a_stream_carry_their_index(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=6)
    whole = [output.token_ids for output in llm.generate("x", params)[0].outputs]
    tokens = [[], [], []]
    for part in llm.stream("x", params):
        tokens[part.index] += part.token_ids
    assert tokens == whole


def test_an_error_while_running_is_raised_with_all_outputs(llm, monkeypatch):
    logits = llm.engine.runner.logits

    def poisoned(hidden, rows):
        scores = logits(hidden, rows)
        scores[0, 0] = float("nan")
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "logits", poisoned)
        with pytest.raises(RequestError, match="requests failed; the first: ValueError: the model") as caught:
            llm.generate(["a", "b"], SamplingParams(max_tokens=1))
        with pytest.raises(RequestError, match="1 of 1"):
            list(llm.stream("a"))
    assert len(caught.value.outputs) == 2
    assert llm.generate("a")[0].error is None


def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    forward, calls = llm.engine.runner.forward, []

    def interrupt(step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(step)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 20, SamplingParams(max_tokens=9))
    assert not llm.engine.has_unfinished()
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 16


def test_an_int8_cache_and_a_lower_dtype_run(folder):
    for options in ({"cache_dtype": "int8"}, {"dtype": "bfloat16"}, {"dtype": torch.float16}):
        assert len(LLM(folder, **options).generate("abc")[0].outputs[0].token_ids) == 16


def test_the_progress_bar_shows_when_asked(llm, capsys):
    llm.generate(["a", "b"], use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["ok", ""], r"prompts\[1\]: the prompt is empty"),
        (["ok", 3.5], r"prompts\[1\] must be a text, a list of token ids"),
        ([[1, "x"]], r"prompts\[0\] must be a text"),
        ({"text": "x"}, r"prompts\[0\] must have either 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "must have either"),
        ([[300]], r"prompts\[0\]: token ids in prompt must be integers in \[0, 258\), got 300"),
        (["a" * 600], "the prompt has 600 tokens; max_model_len=512 leaves room for 511"),
    ],
)
def test_wrong_prompts_are_named_before_anything_runs(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt)
    assert not llm.engine.has_unfinished()


def test_a_wrong_stream_is_refused_when_it_is_asked_for(llm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.stream("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be 'auto' or one of .*, got 'float8'"),
        ({"device": "tpu9"}, "device must be 'auto' or a device that torch knows, got 'tpu9'"),
        ({"cache_dtype": "int4"}, "cache_dtype must be 'auto' or 'int8', got 'int4'"),
        ({"max_model_len": 513}, r"max_model_len must be in \[2, 512\] for this model, got 513"),
        ({"max_model_len": 1}, "max_model_len must be in"),
        ({"max_model_len": 512, "cache_bytes": 100_000}, "one sequence of 512 tokens needs 8: raise cache_bytes"),
        ({"cache_bytes": 10}, "10 bytes of cache hold 0 blocks"),
        ({"max_num_seqs": 0}, "block_size and max_num_seqs must be at least 1, got 64 and 0"),
        ({"block_size": 0}, "must be at least 1, got 0 and 256"),
        ({"max_num_batched_tokens": 5}, "max_num_batched_tokens must be at least max_num_seqs=256, got 5"),
        ({"tokenizer": "/nowhere"}, "there is no tokenizer in '/nowhere'"),
    ],
)
def test_wrong_settings_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="torch finds no GPU"):
        LLM(folder, device="cuda")


def test_a_name_that_is_no_folder_says_how_to_fetch_one(tmp_path):
    with pytest.raises(ValueError, match=r"'some/model' is not a model folder.*hf download"):
        LLM("some/model")


def test_a_small_cache_shortens_sequences_unless_a_length_was_asked_for(folder):
    llm = LLM(folder, cache_bytes=100_000)
    config = llm.engine.config
    assert config.max_model_len == config.num_blocks * config.block_size < 512
    (result,) = llm.generate("a", SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == config.max_model_len - 1


def test_the_cache_is_no_larger_than_what_can_be_used(folder):
    config = LLM(folder, max_num_seqs=3, max_model_len=100).engine.config
    assert (config.num_blocks, config.max_model_len) == (3 * 2, 100)


def test_without_a_tokenizer_token_ids_still_work(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    llm = LLM(tmp_path)
    (result,) = llm.generate([[1, 2, 3]])
    assert len(result.outputs[0].token_ids) == 16
    with pytest.raises(ValueError, match="no tokenizer, so there is no text; use token_ids"):
        result.outputs[0].text  # noqa: B018
    assert sum(len(part.token_ids) for part in llm.stream([1, 2, 3])) == 16
    for attempt in (lambda: llm.generate("text"), lambda: llm.chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(ValueError, match="no tokenizer"):
            attempt()
    with_one = LLM(tmp_path, tokenizer=folder)
    assert isinstance(with_one.generate("text")[0].outputs[0].text, str)


def test_without_a_chat_template_chat_says_so(stories):
    with pytest.raises(ValueError, match="no chat template; use generate"):
        LLM(stories).chat([{"role": "user", "content": "hi"}])


@pytest.fixture(scope="module")
def adapted(folder, write_adapter, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    names = {"lora": "lora", "smora": "smora"}
    return LLM(folder, adapters={name: write_adapter(root / name, kind=name, seed=1) for name in names})


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def test_adapters_are_named_once_or_for_each_prompt_in_every_way_of_asking(adapted, llm):
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts, chat = ["import os", "def f"], [{"role": "user", "content": "hi"}]
    plain, lora, smora = (texts(adapted.generate(prompts, params, adapter=name)) for name in (None, "lora", "smora"))
    assert plain == texts(llm.generate(prompts, params))
    assert len({plain[0], lora[0], smora[0]}) == 3
    assert texts(adapted.generate(prompts, params, adapter=["smora", None])) == [smora[0], plain[1]]
    assert "".join(part.text for part in adapted.stream(prompts[1], params, adapter="lora")) == lora[1]
    chats = [texts(adapted.chat(chat, params, adapter=name))[0] for name in (None, "lora", "smora")]
    assert len(set(chats)) == 3
    assert texts(adapted.chat([chat, chat], params, adapter=["smora", "lora"])) == [chats[2], chats[1]]


def test_samples_of_one_prompt_have_its_adapter(adapted):
    params = SamplingParams(n=3, seed=1, max_tokens=6)
    together = adapted.generate(["import os"] * 2, params, adapter=["lora", None])
    for output, name in zip(together, ("lora", None), strict=True):
        (alone,) = adapted.generate("import os", params, adapter=name)
        assert [sample.token_ids for sample in alone.outputs] == [sample.token_ids for sample in output.outputs]


def test_names_of_adapters_are_checked_before_anything_runs(adapted, llm):
    with pytest.raises(ValueError, match=r"there is no adapter 'x'; loaded are \['lora', 'smora'\]"):
        adapted.generate(["a", "b"], adapter=[None, "x"])
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        adapted.generate(["a", "b"], adapter=["lora"])
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        adapted.stream("a", adapter="x")
    for call in (lambda: llm.generate("a", adapter="lora"), lambda: llm.unload_adapter("lora")):
        with pytest.raises(ValueError, match="made without the argument `adapters`"):
            call()
    assert not adapted.engine.has_unfinished()


def test_adapters_come_and_go_while_others_generate(adapted, write_adapter, tmp_path):
    params = SamplingParams(temperature=0, max_tokens=12)
    (want,) = texts(adapted.generate("import os", params, adapter="lora"))
    parts = adapted.stream("import os", params, adapter="lora")
    text = next(parts).text
    adapted.unload_adapter("lora")
    adapted.load_adapter("lora", write_adapter(tmp_path / "new", seed=7))
    (new,) = texts(adapted.generate("import os", params, adapter="lora"))
    assert text + "".join(part.text for part in parts) == want
    assert new != want
    with pytest.raises(ValueError, match="'lora' is loaded already"):
        adapted.load_adapter("lora", tmp_path / "new")
