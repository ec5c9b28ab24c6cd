"""Adapters as models of the API, loaded and unloaded by clients while others are answered."""

import threading
from itertools import count

import openai
import pytest

from anabranch import LLM, SamplingParams
from anabranch.adapters.attach import linear_layers
from anabranch.models.weights import load_model
from anabranch.serve.adapters.arena import bytes_per_rank

GREEDY = {"temperature": 0, "max_tokens": 8}
PROMPT = "import os"


@pytest.fixture(scope="module")
def root(write_adapter, tmp_path_factory):
    """Below `root/in` adapters that clients may load; beside it one that they may not."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(("lora", "smora", "triadapt", "lora2")):
        write_adapter(path / "in" / kind, kind=kind.strip("2"), seed=seed)
    write_adapter(path / "out", seed=9)
    return path


@pytest.fixture(scope="module")
def server(folder, root, serve):
    """`lora` and `smora` from the start; the tests leave it so."""
    adapters = {name: root / "in" / name for name in ("lora", "smora")}
    return serve(LLM(folder, adapters=adapters), adapter_root=root / "in")


@pytest.fixture(scope="module")
def texts(folder, root):
    """What each says, without a server."""
    names = ["lora", "smora", "triadapt", "lora2"]
    llm = LLM(folder, adapters={name: root / "in" / name for name in names})
    outputs = llm.generate([PROMPT] * (len(names) + 1), SamplingParams(**GREEDY), adapter=[None, *names])
    return {name: output.outputs[0].text for name, output in zip((None, *names), outputs, strict=True)}


def say(server, model=None, **fields):
    fields = fields if model is None else {**fields, "model": model}
    return server.complete(PROMPT, **GREEDY, **fields)["choices"][0]["text"]


def load(server, name, path, expect=200, **fields):
    response = server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})
    assert response.status_code == expect, response.text
    return response.text if expect == 200 else response.json()["error"]


def unload(server, name, expect=200):
    response = server.client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert response.status_code == expect, response.text
    return response.text if expect == 200 else response.json()["error"]


def test_an_adapter_is_a_model(server, texts):
    assert len(set(texts.values())) == 5
    assert (say(server), say(server, "tiny")) == (texts[None], texts[None])
    assert (say(server, "lora"), say(server, "smora")) == (texts["lora"], texts["smora"])
    answer = server.complete([PROMPT, PROMPT], model="smora", **GREEDY)
    assert answer["model"] == "smora"
    assert [choice["text"] for choice in answer["choices"]] == [texts["smora"]] * 2
    chats = [server.chat([{"role": "user", "content": "hi"}], model=m, **GREEDY) for m in ("tiny", "lora")]
    assert [chat["model"] for chat in chats] == ["tiny", "lora"]
    assert len({chat["choices"][0]["message"]["content"] for chat in chats}) == 2
    assert server.post("/tokenize", {"model": "lora", "prompt": "a"})["count"] == 1
    error = server.complete(PROMPT, model="poet", expect=404)["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == "the model 'poet' is not here; choose 'tiny' or 'lora' or 'smora'"


def test_models_are_listed_with_their_parents(server):
    shown = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
    assert list(shown) == ["tiny", "lora", "smora"]
    assert (shown["lora"]["parent"], shown["lora"]["root"]) == ("tiny", "lora")
    assert "parent" not in shown["tiny"]
    assert server.client.get("/v1/models/smora").json() == shown["smora"]
    assert server.client.get("/v1/models/poet").status_code == 404


def test_an_adapter_comes_and_goes(server, root, texts):
    assert load(server, "new", "triadapt") == "Success: LoRA adapter 'new' added successfully."
    assert say(server, "new") == texts["triadapt"]
    assert "'new' is loaded already" in load(server, "new", "lora2", expect=400)["message"]
    load(server, "new", root / "in" / "lora2", load_inplace=True)
    assert say(server, "new") == texts["lora2"]
    assert server.client.get("/v1/models/new").json()["root"] == "lora2"
    assert unload(server, "new") == "Success: LoRA adapter 'new' removed successfully."
    assert server.complete(PROMPT, model="new", expect=404)["error"]["code"] == "model_not_found"
    assert unload(server, "new", expect=404)["code"] == "model_not_found"
    assert "is the model's own name" in load(server, "tiny", "lora", expect=400)["message"]


@pytest.fixture(scope="module")
def links(root):
    """Ways out of the root."""
    inside = root / "in"
    (inside / "link").symlink_to(root / "out")
    (inside / "loop").symlink_to("loop")
    mixed = inside / "mixed"
    mixed.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (mixed / name).symlink_to(root / "out" / name)
    (inside / "turn").symlink_to(inside / "lora")


OUTSIDE = ["../out", "link", "mixed", "loop", "nowhere", ".", "/etc", "\0", "x" * 4000, "a/" * 2000, "lora/../../out"]


@pytest.mark.parametrize("path", OUTSIDE, ids=range(len(OUTSIDE)))
def test_outside_the_root_there_is_nothing(server, root, links, path):
    error = load(server, "x", path, expect=404)
    assert (error["code"], error["param"]) == ("adapter_not_found", "lora_path")
    expected = f"there is no folder {path!r} with adapter_config.json and adapter_model.safetensors below the root of"
    assert error["message"] == f"{expected} adapters"  # the same whether it exists or not
    assert str(root) not in error["message"]


def test_links_within_the_root_are_followed(server, links, texts):
    load(server, "turned", "turn")
    assert say(server, "turned") == texts["lora"]
    unload(server, "turned")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "bad/adapter_config.json is not valid JSON"),
        ("adapter_config.json", b"[]", "must hold a JSON object"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "peft_type must be LORA"),
        ("adapter_model.safetensors", b"not tensors", "bad/adapter_model.safetensors cannot be read"),
        ("adapter_model.safetensors", b"\x10" + b"\0" * 7 + b'{"x":{"dtype":"F', "cannot be read"),
    ],
)
def test_folders_that_cannot_be_served_are_told(server, root, write_adapter, name, content, message):
    bad = write_adapter(root / "in" / "bad")
    (bad / name).write_bytes(content)
    error = load(server, "bad", "bad", expect=400)
    assert message in error["message"]
    assert str(root) not in error["message"]
    assert server.client.get("/v1/models/bad").status_code == 404


def test_other_sizes_and_too_many_ranks_are_told(server, folder, root, write_adapter, serve):
    wide = write_adapter(root / "in" / "wide", ranks=7, targets=["q_proj"])
    small = serve(
        LLM(folder, adapters={}, adapter_bytes=6 * bytes_per_rank(linear_layers(load_model(folder)))),
        adapter_root=root / "in",
    )
    assert "has 7 ranks, there is room for 6" in load(small, "wide", "wide", expect=400)["message"]
    load(small, "lora", "lora")
    (wide / "adapter_config.json").write_text(
        '{"peft_type": "RANK_LORA", "settings": {"ranks": 8}, "target_modules": []}'
    )
    assert load(server, "wide", "wide", expect=400)["message"].startswith("tensor ")


def test_without_a_root_nobody_loads(serve, folder, root):
    for llm in (LLM(folder, adapters={"lora": root / "in" / "lora"}), LLM(folder)):
        closed = serve(llm)
        assert "--adapter-root" in load(closed, "x", "lora", expect=404)["message"]
        assert "--adapter-root" in unload(closed, "lora", expect=404)["message"]
    assert closed.client.get("/v1/models").json()["data"][-1]["id"] == "tiny"


def test_a_running_request_does_not_notice_that_its_adapter_is_gone(serve, folder, root, texts):
    server = serve(LLM(folder, adapters={"lora": root / "in" / "lora"}), adapter_root=root / "in")
    server.gate.close()
    found = []
    thread = threading.Thread(target=lambda: found.append(say(server, "lora")))
    thread.start()
    server.until(lambda: server.running == 1)
    unload(server, "lora")
    load(server, "lora", "smora")
    server.gate.open()
    thread.join(60)
    assert found == [texts["lora"]]
    assert say(server, "lora") == texts["smora"]


def test_an_adapter_whose_files_have_changed_is_an_error_of_the_server(serve, folder, root, write_adapter):
    path = write_adapter(root / "in" / "changing")
    server = serve(LLM(folder, adapters={"a": path}, adapter_host_bytes=0))
    write_adapter(path, seed=4)
    error = server.complete(PROMPT, model="a", expect=500)["error"]
    assert (error["code"], error["type"]) == ("adapter_unreadable", "server_error")
    assert say(server)
    assert server.free_blocks == server.all_blocks


def test_metrics_tell_where_adapters_are(serve, folder, root):
    adapters = {name: root / "in" / name for name in ("lora", "smora")}
    room = 5 * bytes_per_rank(linear_layers(load_model(folder)))
    server = serve(LLM(folder, adapters=adapters, adapter_bytes=room))
    for name in ("lora", "smora", "smora", "lora"):
        say(server, name)
    lines = server.client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("anabranch_adapter"))
    wanted = {"adapters_named": 2, "adapters_resident": 1, "adapter_loads_total": 3, "adapter_evictions_total": 2}
    assert {name: float(values[f"anabranch_{name}"]) for name in wanted} == wanted
    assert float(values["anabranch_adapter_reads_total"]) == 2


def test_no_request_fails_while_adapters_come_and_go(serve, folder, root, texts):
    adapters = {name: root / "in" / name for name in ("lora", "smora")}
    room = 9 * bytes_per_rank(linear_layers(load_model(folder)))  # two of rank 4: a third makes one give way
    llm = LLM(folder, adapters=adapters, adapter_bytes=room, adapter_host_bytes=20_000, max_num_seqs=6)
    server = serve(llm, adapter_root=root / "in")
    done, answers, wrong = threading.Event(), count(), []

    def ask(model):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            while not done.is_set():
                try:
                    answer = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
                    stream = client.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY)
                    said = {answer.choices[0].text, "".join(part.choices[0].text for part in stream)}
                    if said != {texts[None if model == "tiny" else model]}:
                        wrong.append((model, said))
                    next(answers)
                except Exception as error:
                    wrong.append((model, error))

    threads = [threading.Thread(target=ask, args=(model,)) for model in ("tiny", "lora", "smora", "lora", "smora")]
    for thread in threads:
        thread.start()
    try:
        for number in range(30):
            name = ("triadapt", "lora2")[number % 2]
            load(server, "guest", name, load_inplace=number % 3 > 0)
            assert say(server, "guest") == texts[name]
            if number % 3 == 2:
                unload(server, "guest")
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert wrong == []
    assert next(answers) > 10
    assert llm.engine.adapter_slots.evictions > 10
    assert {held.pins for held in llm.engine.adapter_slots.residents.values()} == {0}
