"""The two APIs over real sockets: every answer is compared with what `LLM` gives for the same tokens and seed."""

import json
import math

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from anabranch import LLM, SamplingParams
from anabranch.serve.http import app as app_module

PROMPTS = ["import os", "def f(x):\n", "€uro ¥en"]
GREEDY = {"temperature": 0, "max_tokens": 12}


def events(server, path, body):
    """The events of a streamed answer, which must end with [DONE]."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def joined(parts):
    """Text by choice."""
    texts = {}
    for part in parts:
        for choice in part["choices"]:
            piece = choice["delta"]["content"] if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


def expected(offline, prompts, **params):
    return [output.text for one in offline.generate(prompts, SamplingParams(**params)) for output in one.outputs]


def test_texts_and_token_ids_alone_and_in_batches(server, offline):
    texts = expected(offline, PROMPTS, **GREEDY)
    ids = [offline.encode(prompt) for prompt in PROMPTS]
    for prompt, text in [*zip(PROMPTS, texts, strict=True), *zip(ids, texts, strict=True)]:
        answer = server.complete(prompt, **GREEDY)
        assert [choice["text"] for choice in answer["choices"]] == [text]
        assert answer["object"] == "text_completion"
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens"] == len(offline.encode(prompt) if isinstance(prompt, str) else prompt)
    for batch in (PROMPTS, ids):
        answer = server.complete(batch, **GREEDY)
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(texts))


def test_samples_and_seeds_are_those_of_the_engine(server, offline):
    fields = {"n": 3, "seed": 7, "max_tokens": 10, "temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.001,
              "repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {"65": 2.0}}  # fmt: skip
    params = {**fields, "logit_bias": {65: 2.0}}
    texts = expected(offline, PROMPTS[:2], **params)
    answer = server.complete(PROMPTS[:2], **fields)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(texts))
    assert joined(events(server, "/v1/completions", {"prompt": PROMPTS[:2], **fields})) == dict(enumerate(texts))


def test_streams_give_whole_characters_and_usage_at_the_end(server, offline):
    (text,) = expected(offline, [PROMPTS[2]], **GREEDY)
    body = {"prompt": PROMPTS[2], **GREEDY, "stream_options": {"include_usage": True}}
    *parts, last = events(server, "/v1/completions", body)
    assert joined(parts) == {0: text}
    assert all(part["usage"] is None for part in parts)
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "length"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == len(offline.encode(PROMPTS[2])) + 12
    assert len({part["id"] for part in [*parts, last]}) == 1
    assert all("usage" not in part for part in events(server, "/v1/completions", {"prompt": "a", **GREEDY}))


def test_stop_texts_stop_tokens_and_lengths(server, offline):
    (text,) = expected(offline, ["import os"], **GREEDY)
    stop = text[5:7]
    (choice,) = server.complete("import os", stop=stop, **GREEDY)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[: text.index(stop)], "stop", stop)
    (choice,) = server.complete("import os", stop=[stop], include_stop_str_in_output=True, **GREEDY)["choices"]
    assert choice["text"] == text[: text.index(stop) + len(stop)]
    third = offline.generate("import os", SamplingParams(**GREEDY))[0].outputs[0].token_ids[2]
    answer = server.complete("import os", stop_token_ids=[third], min_tokens=1, return_token_ids=True, **GREEDY)
    (choice,) = answer["choices"]
    assert choice["stop_reason"] == third == choice["token_ids"][-1]
    assert choice["prompt_token_ids"] == offline.encode("import os")
    assert server.complete("import os", max_tokens=100_000)["usage"]["total_tokens"] == 512  # as far as the context


def test_logprobs_of_completions(server, offline):
    params = SamplingParams(**GREEDY, logprobs=2, prompt_logprobs=2)
    (output,) = offline.generate("import os", params)
    (choice,) = server.complete("import os", logprobs=2, **GREEDY)["choices"]
    shown, wanted = choice["logprobs"], output.outputs[0]
    assert shown["token_logprobs"] == pytest.approx(
        [position[token].logprob for token, position in zip(wanted.token_ids, wanted.logprobs, strict=True)], abs=1e-5
    )
    assert all(
        max(top.values()) == own for own, top in zip(shown["token_logprobs"], shown["top_logprobs"], strict=True)
    )
    (echoed,) = server.complete("import os", logprobs=2, echo=True, **GREEDY)["choices"]
    length = len(output.prompt_token_ids)
    assert echoed["text"] == "import os" + choice["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is None is echoed["logprobs"]["top_logprobs"][0]
    assert echoed["logprobs"]["token_logprobs"][1:length] == pytest.approx(
        [output.prompt_logprobs[i][output.prompt_token_ids[i]].logprob for i in range(1, length)], abs=1e-5
    )
    assert echoed["logprobs"]["token_logprobs"][length:] == pytest.approx(shown["token_logprobs"], abs=1e-4)
    offsets = echoed["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert [echoed["text"][offset] for offset in offsets[:9]] == list("import os")


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt_needs_no_output(server, offline, max_tokens):
    """What lm-evaluation-harness does for every answer of a multiple choice."""
    ids = [offline.encode(prompt) for prompt in PROMPTS]
    answer = server.complete(ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    outputs = offline.generate(ids, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    assert answer["usage"]["completion_tokens"] == max_tokens * len(ids)
    for choice, output in zip(answer["choices"], outputs, strict=True):
        shown = choice["logprobs"]["token_logprobs"]
        assert len(shown) == len(output.prompt_token_ids) + max_tokens
        assert sum(shown[1 : len(output.prompt_token_ids)]) == pytest.approx(
            sum(p[t].logprob for t, p in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)),
            abs=1e-4,
        )
        assert choice["finish_reason"] == "length"
        written = output.outputs[0].text if max_tokens else ""
        assert choice["text"] == offline.tokenizer.decode(output.prompt_token_ids) + written


def test_echo_without_logprobs_and_in_a_stream(server):
    (choice,) = server.complete("import os", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("import os", None)
    whole = server.complete(["import os", "x ="], echo=True, logprobs=1, n=2, **GREEDY)["choices"]
    parts = events(
        server, "/v1/completions", {"prompt": ["import os", "x ="], "echo": True, "logprobs": 1, "n": 2, **GREEDY}
    )
    assert joined(parts) == {choice["index"]: choice["text"] for choice in whole}
    for choice in whole:
        mine = [one["logprobs"] for part in parts for one in part["choices"] if one["index"] == choice["index"]]
        for name in ("tokens", "text_offset"):
            assert [value for one in mine for value in one[name]] == choice["logprobs"][name]


def test_a_conversation_is_rendered_by_the_template(server, offline):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (wanted,) = offline.chat(messages, SamplingParams(**GREEDY, logprobs=2))
    answer = server.chat(messages, logprobs=True, top_logprobs=2, **GREEDY)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": wanted.outputs[0].text}
    assert answer["usage"]["prompt_tokens"] == len(wanted.prompt_token_ids)
    content = choice["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [[token] for token in wanted.outputs[0].token_ids]  # a byte each
    for one in content:
        assert len(one["top_logprobs"]) == 2
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] >= one["top_logprobs"][1]["logprob"]
    parts = events(server, "/v1/chat/completions", {"messages": messages, **GREEDY})
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in part["choices"][0]["delta"] for part in parts[1:])
    assert joined(parts) == {0: wanted.outputs[0].text}


def test_a_conversation_may_come_in_parts_and_with_values_for_the_template(server, offline):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {"messages": [{"role": "user", "content": parts}], "chat_template_kwargs": {"mood": "!"}}
    ids = server.post("/tokenize", body)["tokens"]
    assert offline.tokenizer.decode(ids) == "<user>one\ntwo!<assistant>"
    ids = server.post("/tokenize", {**body, "add_generation_prompt": False})["tokens"]
    assert offline.tokenizer.decode(ids) == "<user>one\ntwo!"
    assert server.post("/v1/chat/completions", {**body, "max_completion_tokens": 3})["usage"]["completion_tokens"] == 3


def test_outputs_take_the_form_that_is_asked_for(server):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    messages = [{"role": "user", "content": "a number"}]
    (choice,) = server.chat(messages, response_format=form, max_tokens=100, seed=1)["choices"]
    assert set(json.loads(choice["message"]["content"])) == {"n"}
    body = {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}, "n": 4, "max_tokens": 9, "seed": 1}
    assert set(joined(events(server, "/v1/completions", body)).values()) <= {"yes", "no"}
    (choice,) = server.complete("a", response_format={"type": "text"}, max_tokens=2)["choices"]
    assert choice["finish_reason"] == "length"


def test_prefixes_are_reported(server):
    prompt = list(range(200))
    server.complete(prompt, max_tokens=1)
    usage = server.complete(prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 192}  # three blocks of 64
    assert (
        server.complete(prompt, max_tokens=1, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    )


def test_models_have_names(server):
    (one,) = server.client.get("/v1/models").json()["data"]
    assert (one["id"], one["max_model_len"]) == ("tiny", 512)
    assert server.client.get("/v1/models/tiny").json() == one
    assert server.client.get("/v1/models/some/other").status_code == 404
    assert server.complete("a", model="tiny", max_tokens=1)["model"] == "tiny"
    error = server.complete("a", model="gpt-4", expect=404)["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_the_tokenizer_from_afar(server, offline):
    ids = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert ids["tokens"] == offline.encode("hé")
    assert (ids["count"], ids["max_model_len"]) == (3, 512)
    assert ids["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert server.post("/detokenize", {"tokens": ids["tokens"]}) == {"prompt": "hé"}
    assert server.post("/detokenize", {"tokens": []}) == {"prompt": ""}
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>"
    assert "messages" in info["chat_template"]


WRONG = [
    ({"prompt": []}, "prompt: must be a text"),
    ({"prompt": [[]]}, "prompt: must be a text"),
    ({"prompt": [1, "a"]}, "prompt: must be a text"),
    ({"prompt": [True]}, "prompt: must be a text"),
    ({"prompt": [258]}, "token ids in prompt must be integers in [0, 258)"),
    ({"prompt": [-1]}, "token ids in prompt must be"),
    ({"prompt": [1e30]}, "prompt: must be a text"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": ["a"] * 3000}, "at most 2048 prompts"),
    ({}, "prompt: field required"),
    ({"prompt": "a", "max_tokens": "4"}, "max_tokens: input should be a valid integer"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens: input should be a valid integer"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens: input should be greater than or equal to 0"),
    ({"prompt": "a", "min_tokens": 50}, "min_tokens must be in [0, max_tokens=16]"),
    ({"prompt": "a", "n": 129}, "n: input should be less than or equal to 128"),
    ({"prompt": ["a"] * 8, "n": 128}, "the request asks for 1024 samples"),
    ({"prompt": "a", "temperature": -0.1}, "temperature: "),
    ({"prompt": "a", "top_p": 0}, "top_p: "),
    ({"prompt": "a", "logprobs": 21}, "at most 20 log-probabilities"),
    ({"prompt": "a", "stop": [""]}, "stop: must be a text or at most 16 texts"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop: must be a text or at most 16 texts"),
    ({"prompt": "a", "stop": "x" * 1025}, "stop: must be a text or at most 16 texts"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "the keys of logit_bias must be token ids"),
    ({"prompt": "a", "logit_bias": {"300": 1}}, "token ids in logit_bias"),
    ({"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias.3: "),
    ({"prompt": "a", "seed": 1 << 63}, "seed"),
    ({"prompt": "a", "best_of": 2}, "best_of must be equal to n"),
    ({"prompt": "a", "suffix": "x"}, "'suffix' is not supported"),
    ({"prompt": "a", "tools": [{}]}, "'tools' is not supported"),
    ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options are allowed only with stream=true"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type must be"),
    ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "schema"),
    ({"prompt": "a", "structured_outputs": {"regex": "("}}, "regex"),
    ({"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "exclude one another"),
    ({"prompt": "a", "response_format": {"a": json.loads("[" * 40 + "]" * 40)}}, "more than 32 levels"),
    ({"prompt": "a" * 600}, "the prompt has 600 tokens, and the context of 512"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_with_the_reason(server, body, message):
    error = server.post("/v1/completions", body, expect=400)["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


WRONG_CHATS = [
    ({"messages": []}, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, "messages.0.content: field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "'tool_calls' is not supported"),
    ({"messages": [{"role": "developer", "content": "a"}]}, "template refuses this conversation: no developers"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "top_logprobs are allowed only with"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 2}, "they differ"),
    ({"messages": [{"role": "user", "content": "a"}], "audio": {"voice": "x"}}, "'audio' is not supported"),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": "x"}}, "be named"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "the context of 512"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), WRONG_CHATS, ids=lambda value: str(value)[:60])
def test_conversations_that_cannot_work_are_refused_with_the_reason(server, body, message):
    assert message in server.post("/v1/chat/completions", body, expect=400)["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "n": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 100_000,
        b'{"prompt": "a", "response_format": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
    ],
    ids=lambda raw: repr(raw[:40]),
)  # fmt: skip
def test_what_is_no_request_is_refused(server, raw):
    response = server.client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    response = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_what_clients_send_out_of_habit_changes_nothing(server):
    habits = {"user": "me", "metadata": {"a": "b"}, "store": True, "suffix": None, "best_of": 1, "tools": None,
              "tool_choice": "none", "logit_bias": {}, "stop": None, "seed": None, "service_tier": "auto"}  # fmt: skip
    assert server.complete("a", **GREEDY)["choices"] == server.complete("a", **GREEDY, **habits)["choices"]


def test_unknown_places_and_methods_are_answered_in_the_same_form(server):
    for response, status in ((server.client.get("/v2"), 404), (server.client.put("/v1/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_failing_model_fails_its_requests_and_no_others(server, offline):
    server.gate.failure = RuntimeError("broken")
    error = server.complete("import os", expect=500)["error"]
    assert error["code"] == "request_failed"
    assert "broken" in error["message"]
    (last,) = events(server, "/v1/completions", {"prompt": "import os"})
    assert "broken" in last["error"]["message"]
    server.gate.failure = None
    assert server.client.get("/health").status_code == 200
    texts = expected(offline, ["import os"], **GREEDY)
    assert [choice["text"] for choice in server.complete("import os", **GREEDY)["choices"]] == texts


def test_health_turns_red_while_every_step_fails(start):
    server = start()
    server.gate.failure = RuntimeError("broken")
    for _ in range(3):
        assert server.client.get("/health").status_code == 200
        server.complete("import os", expect=500)
    response = server.client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "unavailable")
    server.gate.failure = None
    server.complete("import os")
    assert server.client.get("/health").json() == {"status": "ok"}


def test_a_crash_of_the_engine_is_told_to_everybody(start):
    server = start()
    server.llm.engine.step = lambda: 1 / 0
    for _ in range(2):
        error = server.complete("import os", expect=500)["error"]
        assert error["code"] == "engine_crashed"
    response = server.client.get("/health")
    assert (response.status_code, "ZeroDivisionError" in response.json()["reason"]) == (503, True)


def test_a_full_queue_asks_to_come_again(start):
    server = start(max_num_seqs=2, max_queue=3)
    server.gate.close()
    with server.client.stream("POST", "/v1/completions", json={"prompt": ["a", "b"], "n": 2, "stream": True}):
        response = server.client.post("/v1/completions", json={"prompt": "c", "n": 2})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert "the queue is full" in response.json()["error"]["message"]
        error = server.complete("c", n=6, expect=400)["error"]  # that never fits
        assert "asks for 6 samples" in error["message"]
        server.gate.open()
        assert server.complete("c", max_tokens=1)["usage"]["completion_tokens"] == 1
    server.until(lambda: server.complete("c", n=5, max_tokens=1)["usage"]["completion_tokens"] == 5)


def test_metrics_count_what_has_passed(start):
    server = start()
    server.complete(list(range(130)), n=2, max_tokens=5)
    server.complete(list(range(130)), max_tokens=5)
    values = {}
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("anabranch_"):
            name, value = line.rsplit(" ", 1)
            values[name.removeprefix("anabranch_")] = float(value)
    assert values["prompt_tokens_total"] == 260
    assert values["prefix_hit_tokens_total"] == 128
    assert values["generated_tokens_total"] == 15
    assert values['finished_requests_total{reason="length"}'] == 2
    assert values["first_token_seconds_count"] == 2
    assert values["inter_token_seconds_count"] == 12
    assert values["requests_running"] == values["requests_waiting"] == values["cache_usage_ratio"] == 0
    assert 0 < values["model_seconds_total"] < values["engine_busy_seconds_total"]
    assert math.isfinite(values["request_seconds_sum"])


def test_the_page_has_a_strict_policy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(app_module, "PLAYGROUND", tmp_path / "playground.html")
    assert server.client.get("/").status_code == 404
    (tmp_path / "playground.html").write_text("<title>x</title>")
    response = server.client.get("/")
    assert response.text == "<title>x</title>"
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.fixture(scope="module")
def schema(folder, serve, tmp_path_factory):
    """Of a server whose context is small: what is fuzzed seldom limits its output."""
    llm, root = LLM(folder, max_model_len=64, adapters={}), tmp_path_factory.mktemp("root")
    return schemathesis.openapi.from_url(f"{serve(llm, adapter_root=root).url}/openapi.json")


ROUTES = [
    ("POST", "/v1/completions", 60), ("POST", "/v1/chat/completions", 60), ("POST", "/tokenize", 25),
    ("POST", "/detokenize", 25), ("GET", "/v1/models/{name}", 10), ("GET", "/v1/models", 2), ("GET", "/health", 2),
    ("GET", "/metrics", 2), ("GET", "/tokenizer_info", 2), ("POST", "/v1/load_lora_adapter", 25),
    ("POST", "/v1/unload_lora_adapter", 10),
]  # fmt: skip


def test_all_routes_are_fuzzed(schema):
    assert {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()} == {r[:2] for r in ROUTES}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path", "examples"), ROUTES, ids=lambda value: str(value))
def test_no_request_that_the_schema_allows_or_just_forbids_breaks_the_server(schema, method, path, examples, mode):
    operation = schema[path][method]
    if mode.is_negative and method == "GET":
        mode = GenerationMode.POSITIVE  # nothing of them can be wrong

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def fuzz(case):
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    fuzz()
