"""Structured output from end to end: three kinds of tokenizers, random tokens, and judges that are not ours."""

import json
import re
import sys

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anabranch import LLM, SamplingParams, StructuredOutput
from anabranch.models.weights import save_model
from anabranch.serve import grammar as grammar_module
from anabranch.serve.choose import NO_TOKEN
from anabranch.serve.generate_command import SHIPPED
from anabranch.serve.grammar import Grammars
from anabranch.serve.llm import RequestError
from anabranch.serve.sampler import Draw, Sampler, ceilings, unpack

SEEDS = 24
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "né\n", 3, None]}, "maxItems": 2},
        "share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        "next": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
END = 257  # of the shipped model, whose token b is the byte b


def bpe_tokenizer():
    """Byte-level BPE with some merges, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(PERSON, indent=2), "the yes and no of 12 cats and 345 né dogs"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def shipped():
    return LLM(SHIPPED)


@pytest.fixture(scope="module")
def stories(data):
    return LLM(data("stories260k"))


@pytest.fixture(scope="module")
def bpe(build, tmp_path_factory):
    """Random weights, and a vocabulary padded beyond the tokenizer's."""
    path = tmp_path_factory.mktemp("bpe")
    tokenizer = bpe_tokenizer()
    save_model(build(vocab_size=tokenizer.get_vocab_size() + 37, eos_ids=(0,)), path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return LLM(path)


@pytest.fixture(params=["shipped", "stories", "bpe"])
def llm(request):
    return request.getfixturevalue(request.param)


def outputs(llm, seed=0, prompt="The answer: ", **fields):
    """The samples of one prompt, SEEDS of them unless fields say otherwise."""
    form = StructuredOutput(**{name: fields.pop(name) for name in list(fields) if name in StructuredOutput.__slots__})
    params = SamplingParams(**{"n": SEEDS, "max_tokens": 300, "seed": seed, **fields}, structured=form)
    return llm.generate(prompt, params)[0].outputs


def texts(llm, **fields):
    """The texts of samples that must all have ended by themselves."""
    found = outputs(llm, **fields)
    assert {output.finish_reason for output in found} == {"stop"}
    assert {output.stop_reason for output in found} == {None}
    return [output.text for output in found]


def favour(llm, text):
    """A bias so strong that the token with this text comes wherever the form allows it."""
    tokenizer = llm.engine.tokenizer
    ids = range(tokenizer.get_vocab_size())
    return {token: 100.0 for token in ids if tokenizer.decode([token], skip_special_tokens=False) == text}


def test_json_satisfies_its_schema(llm):
    found = texts(llm, json_schema=PERSON)
    for text in found:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(found)) == SEEDS


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_json_at_other_temperatures(llm, temperature):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}
    for text in texts(llm, n=4, json_schema=schema, temperature=temperature):
        jsonschema.validate(json.loads(text), schema)


def test_any_json_object(llm):
    found = outputs(llm, json_object=True)
    for output in found:
        assert output.text.startswith("{")
        assert output.finish_reason in ("stop", "length")
        assert output.finish_reason == "length" or isinstance(json.loads(output.text), dict)
    assert set(texts(llm, n=3, json_object=True, logit_bias=favour(llm, "}"))) == {"{}"}


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{4}-(0[1-9]|1[0-2])", r"(né|😀|\n)+ ?[a-c]{2,5}", r"^x{3}$", r"(?i)yes|no", r"a/\"b\\c#//"]
)
def test_the_whole_text_matches_a_regex(llm, pattern):
    for text in texts(llm, n=8, regex=pattern, logit_bias=dict.fromkeys(llm.engine.eos_ids, 3.0)):
        assert re.fullmatch(pattern, text), text


def test_the_text_is_one_of_the_choices(llm):
    choices = ("yes", "no", "none of\nthem", 'a "né" 😀', "no!")
    found = texts(llm, choice=choices)
    assert set(found) <= set(choices)
    assert len(set(found)) > 1


def test_there_may_be_thousands_of_choices(shipped):
    choices = [f"word {number}" for number in range(4000)]
    assert set(texts(shipped, n=4, choice=choices)) <= set(choices)


def test_a_grammar_can_nest(llm):
    rules = 'start: "(" inner ")"\ninner: start | /[0-9]{2}/'
    for output in outputs(llm, grammar=rules, max_tokens=40):
        assert output.finish_reason == "length" or re.fullmatch(r"(\()+[0-9]{2}(\))+", output.text)
        assert output.finish_reason == "length" or output.text.count("(") == output.text.count(")")
    (output,) = outputs(llm, n=1, grammar=rules, max_tokens=40, logit_bias=favour(llm, "("))
    assert set(output.text) == {"("}
    (text,) = texts(llm, n=1, grammar=rules, max_tokens=40, logit_bias=favour(llm, "7"))
    assert re.fullmatch(r"\(+77\)+", text)


def bounded_schemas():
    """Small schemas whose values are short."""
    bounds = st.tuples(st.integers(-200, 200), st.integers(0, 300))
    integers = st.integers(-(2**53), 2**53)
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": ["null", "boolean"]}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        st.integers(0, 4).map(lambda n: {"type": "string", "maxLength": n}),
        st.lists(st.text(max_size=3) | integers | st.none(), min_size=1, max_size=3).map(lambda v: {"enum": v}),
        (st.text(max_size=3) | integers).map(lambda value: {"const": value}),
    )

    def extend(inner):
        arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 1)).map(
            lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
        )
        objects = st.tuples(st.dictionaries(st.text(max_size=3), inner, max_size=3), st.booleans()).map(
            lambda o: {
                "type": "object",
                "properties": o[0],
                "required": list(o[0]) if o[1] else [],
                "additionalProperties": False,
            }
        )
        return arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})

    return st.recursive(leaves, extend, max_leaves=5)


@settings(max_examples=40)
@given(bounded_schemas(), st.integers(0, 2**32))
def test_json_satisfies_small_schemas(shipped, schema, seed):
    for text in texts(shipped, n=2, seed=seed, max_tokens=450, json_schema=schema):
        jsonschema.validate(json.loads(text), schema)


def test_an_output_that_can_only_end_ends_without_an_end_token(shipped):
    (output,) = outputs(shipped, n=1, choice=("yes",), logprobs=0)
    assert output.token_ids == list(b"yes")
    assert (output.text, output.finish_reason, output.stop_reason) == ("yes", "stop", None)
    assert len(output.logprobs) == 3


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ({}, "a", "stop"),
        ({"min_tokens": 4}, "abbb", "stop"),
        ({"ignore_eos": True}, "abbbbb", "length"),
        ({"stop_token_ids": [ord("!")], "logit_bias": {ord("!"): 60.0}}, "a", "stop"),
        ({"stop_token_ids": [ord("b")], "logit_bias": {END: -60.0}}, "a", "stop"),
        ({"stop": "bbb", "logit_bias": {END: -60.0}}, "a", "stop"),
        ({"stop": "bbb", "logit_bias": {END: -60.0}, "include_stop_str_in_output": True}, "abbb", "stop"),
        ({"allowed_token_ids": [ord("a"), ord("b"), END], "logit_bias": {END: -60.0}}, "abbbbb", "length"),
    ],
)
def test_end_tokens_come_exactly_where_the_form_may_end(shipped, rules, text, reason):
    """An end token that is by far the most probable one does not come before the "a"."""
    rules = {"logit_bias": {END: 60.0}, "temperature": 0, "max_tokens": 6, **rules}
    (output,) = outputs(shipped, n=1, regex="ab*", **rules)
    assert (output.text, output.finish_reason) == (text, reason)


def test_an_output_that_can_only_end_does_not_wait_for_min_tokens(shipped):
    (output,) = outputs(shipped, n=1, choice=("yes",), min_tokens=10)
    assert (output.text, output.finish_reason) == ("yes", "stop")
    (output,) = outputs(shipped, n=1, choice=("yes",), ignore_eos=True)
    assert (output.text, output.finish_reason) == ("yes", "stop")


def test_max_tokens_cuts_an_output_off(shipped):
    (output,) = outputs(shipped, n=1, regex="a{9}", max_tokens=4)
    assert (output.text, output.finish_reason) == ("aaaa", "length")
    (output,) = outputs(shipped, n=1, regex="a{4}", max_tokens=4)
    assert (output.text, output.finish_reason) == ("aaaa", "stop")


def test_a_stream_has_the_same_texts(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=300, structured=StructuredOutput(json_schema=PERSON))
    whole = [output.text for output in llm.generate("The answer: ", params)[0].outputs]
    parts = ["", "", ""]
    reasons = [None] * 3
    for part in llm.stream("The answer: ", params):
        parts[part.index] += part.text
        reasons[part.index] = part.finish_reason
    assert (parts, reasons) == (whole, ["stop"] * 3)


def test_logprobs_are_of_the_untouched_distribution(shipped):
    free = shipped.generate("x = ", SamplingParams(temperature=0, max_tokens=1, logprobs=-1))[0].outputs[0].logprobs[0]
    bound = outputs(shipped, n=1, prompt="x = ", regex="~", temperature=0, logprobs=-1)[0].logprobs[0]
    assert bound == free
    assert bound[ord("~")].rank > 1


@pytest.mark.parametrize("sizes", [{"num_blocks": 14}, {"max_num_batched_tokens": 8}], ids=["preempted", "chunked"])
def test_outputs_do_not_depend_on_the_schedule(build, make_engine, finish, sizes):
    """Pre-emption computes keys and values again, while a sample's place in the grammar stays where it is."""
    tokenizer = bpe_tokenizer()
    model = build(vocab_size=tokenizer.get_vocab_size(), eos_ids=(0,))
    found = []
    for changes in ({}, sizes):
        engine = make_engine(model=model, tokenizer=tokenizer, **changes)
        for number in range(6):
            form = StructuredOutput(json_schema=PERSON) if number % 2 else None
            ids = tokenizer.encode(f"cat {number} of the ").ids
            engine.add_request(str(number), ids, SamplingParams(seed=number, max_tokens=40, structured=form))
        done = finish(engine)
        found.append({number: done[number].outputs[0].token_ids for number in sorted(done)})
        assert (engine.scheduler.preemptions > 0) == ("num_blocks" in changes)
    assert found[0] == found[1]


def test_a_cached_prefix_changes_nothing(shipped):
    shipped.reset_prefix_cache()
    params = SamplingParams(seed=1, max_tokens=300, structured=StructuredOutput(json_schema=PERSON))
    first, again = (shipped.generate("import os\n" * 20, params)[0] for _ in range(2))
    assert again.num_cached_tokens > first.num_cached_tokens == 0
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def place(grammars, **form):
    return grammars.compile(StructuredOutput(**form)).matcher()


@pytest.fixture(scope="module")
def grammars(shipped):
    return shipped.engine.grammars


RULES = [SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(top_p=0.9, presence_penalty=0.5)]


def test_rows_without_a_form_are_left_alone(grammars):
    """Tokens and logits of free rows, bit for bit, whether or not others in the batch have a form."""
    logits = torch.randn(6, 258, generator=torch.Generator().manual_seed(1))
    logits[4, 7] = 1000.0  # greedy rows take the byte 7, unless it is forbidden
    after = []
    for forms in (False, True):
        draws = [Draw(RULES[row % 3], [1], [END], row) for row in range(6)]
        for row in (1, 3) if forms else ():
            draws[row].matcher = place(grammars, regex="[ab]+")
        sampler, work = Sampler(), logits.clone()
        tokens = [sampler(work.copy_(logits), draws)[0] for _ in range(5)]
        after.append((work, [[row_tokens[row] for row in (0, 2, 4, 5)] for row_tokens in tokens], tokens))
    (plain, free, _), (mixed, beside, tokens) = after
    assert free == beside
    assert torch.equal(plain[[0, 2, 4, 5]], mixed[[0, 2, 4, 5]])
    assert {step[row] for step in tokens for row in (1, 3)} <= {ord("a"), ord("b"), END}


def test_what_a_form_forbids_nothing_allows_again(grammars):
    params = SamplingParams(
        temperature=0, logit_bias={ord("x"): 1e30}, repetition_penalty=5.0, frequency_penalty=-2, presence_penalty=-2
    )
    draw = Draw(params, list(b"xxx"), [END], 0, place(grammars, regex="[ab]{8}"))
    sampler = Sampler()
    for _ in range(8):
        (token,), _ = sampler(torch.randn(1, 258), [draw])
        assert chr(token) in "ab"
    assert draw.matcher.ended


def test_a_dead_end_ends_its_own_request(shipped):
    free = SamplingParams(temperature=0, max_tokens=8)
    form = StructuredOutput(regex="aab")
    bound = [
        SamplingParams(structured=form, temperature=temperature, allowed_token_ids=[ord("a"), END])
        for temperature in (0.0, 1.0)
    ]
    (alone,) = shipped.generate("x = ", free)
    with pytest.raises(RequestError, match="no token may follow: what the form of the output allows") as caught:
        shipped.generate(["x = "] * 4, [bound[0], free, bound[1], SamplingParams(structured=form)])
    first, second, third, fourth = caught.value.outputs
    assert second.outputs[0].token_ids == alone.outputs[0].token_ids
    assert fourth.outputs[0].text == "aab"
    for output in (first, third):
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (list(b"aa"), "error")
        assert "no token may follow" in output.error


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["allowed", "forbidden"])
def test_scores_that_are_no_numbers_are_not_the_grammars_fault(grammars, temperature, where):
    params = SamplingParams(temperature=temperature)
    draw = Draw(params, [1], [END], 0, place(grammars, regex="[ab]+"))
    logits = torch.zeros(1, 258)
    logits[0, ord("a") if where == "allowed" else ord("x")] = float("nan")
    (token,), _ = Sampler()(logits, [draw])
    assert token == NO_TOKEN
    assert draw.matcher.problem is None


def test_a_grammar_that_grows_too_complex_ends_its_own_request(shipped):
    form = StructuredOutput(regex="z(a{1000}){1000}")  # the first step is harmless, the second is not
    (alone,) = shipped.generate("x = ", SamplingParams(temperature=0, max_tokens=8))
    with pytest.raises(RequestError, match=r"the structured output cannot go on: .*too many") as caught:
        shipped.generate(["x = "] * 2, [SamplingParams(structured=form), SamplingParams(temperature=0, max_tokens=8)])
    failed, other = caught.value.outputs
    assert failed.outputs[0].finish_reason == "error"
    assert other.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "a("}, "regex cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\x00-\U0010ffff]"}, "regex cannot be used: no token can follow"),
        ({"regex": "(a{0})*"}, "regex allows no text that is not empty"),
        ({"grammar": "start: undefined"}, "grammar cannot be used"),
        ({"grammar": json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})}, "grammar cannot be used"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "too deeply nested"),
        ({"json_schema": {"type": "person"}}, "json_schema cannot be used: Invalid type: person"),
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "#"}}, "json_schema"),
        ({"json_schema": {"$ref": "file:///etc/hosts"}}, "json_schema cannot be used"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
        ({"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000}, "json_schema"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_runs(shipped, form, message):
    with pytest.raises(ValueError, match=message):
        shipped.generate("x", SamplingParams(structured=StructuredOutput(**form)))
    with pytest.raises(ValueError, match=message):
        shipped.engine.add_request("x", [1], SamplingParams(structured=StructuredOutput(**form)))
    assert not shipped.engine.has_unfinished()


def test_messages_are_short_and_one_line(shipped):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        shipped.engine.grammars.compile(StructuredOutput(regex="(" * 3000))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_form_is_compiled_once_and_not_under_the_engines_lock(shipped, monkeypatch):
    made = []

    class Watched(grammar_module.Grammar):
        def __init__(self, *arguments):
            made.append(shipped.engine._lock.locked())
            super().__init__(*arguments)

    monkeypatch.setattr(grammar_module, "Grammar", Watched)
    schema = {"enum": ["some", "words"]}
    texts(shipped, n=2, json_schema=schema)
    texts(shipped, n=2, json_schema=json.dumps(schema))
    assert made == [False]


def test_only_the_last_forms_are_kept(grammars, monkeypatch):
    monkeypatch.setattr(grammar_module, "KEPT", 2)
    forms = [StructuredOutput(regex=f"kept{number}") for number in range(3)]
    first, second = (grammars.compile(form) for form in forms[:2])
    assert grammars.compile(forms[0]) is first
    grammars.compile(forms[2])
    assert grammars.compile(forms[0]) is first
    assert grammars.compile(forms[1]) is not second


@pytest.mark.parametrize("vocab_size", [200, 258, 300])
def test_rows_fit_models_with_fewer_and_with_more_tokens(shipped, vocab_size):
    grammars = Grammars(shipped.engine.tokenizer, vocab_size, [END] if vocab_size > END else [])
    matcher = place(grammars, regex="[a-cé]+")
    row = np.zeros(matcher.row_bytes, np.uint8)
    matcher.fill(row, [199])
    allowed = ceilings(row[None], vocab_size, torch.device("cpu")) > 0
    assert allowed.shape == (1, vocab_size)
    starts = {*b"abc", "é".encode()[0]}  # 199 is a stop token, and nothing has been written yet
    assert set(allowed[0].nonzero().flatten().tolist()) == {token for token in starts if token < vocab_size}
    matcher.accept(ord("a"))
    row[:] = 0
    matcher.fill(row, [199])
    assert ceilings(row[None], vocab_size, torch.device("cpu"))[0, 199] > 0


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_bits_are_read_alike_on_every_device(count, seed):
    bits = np.random.default_rng(seed).integers(0, 256, (3, 5), dtype=np.uint8)
    slow = torch.tensor([[bool(bits[row, i // 8] >> (i % 8) & 1) for i in range(count)] for row in range(3)])
    assert torch.equal(unpack(torch.from_numpy(bits), count), slow)
    assert torch.equal(ceilings(bits, count, torch.device("cpu")), torch.where(slow, float("inf"), float("-inf")))


def test_no_tokenizer_no_form(make_engine):
    with pytest.raises(ValueError, match="structured output needs a tokenizer"):
        make_engine().add_request("x", [1], SamplingParams(structured=StructuredOutput(regex="a")))


def test_without_llguidance_the_error_names_the_extra(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(shipped.engine.tokenizer, 258, [END])
    with pytest.raises(ImportError, match=re.escape("pip install 'anabranch[structured]'")):
        grammars.compile(StructuredOutput(regex="a"))


def test_samples_keep_their_own_places(grammars):
    grammar = grammars.compile(StructuredOutput(regex="ab|cd"))
    one, other = grammar.matcher(), grammar.matcher()
    rows = np.zeros((2, one.row_bytes), np.uint8)
    one.fill(rows[0], ())
    one.accept(ord("a"))
    one.accept(ord("b"))
    other.fill(rows[1], ())
    assert (one.ended, other.ended) == (True, False)
    assert (rows[0] == rows[1]).all()
