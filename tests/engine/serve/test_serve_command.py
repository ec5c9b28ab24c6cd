"""`anabranch serve` as a process, asked by the `openai` package."""

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import openai
import pytest
import torch

from anabranch import LLM, SamplingParams
from anabranch.adapters.attach import attach
from anabranch.adapters.files import save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.cli import main
from anabranch.models.weights import load_model
from anabranch.serve import serve_command

MAIN = "import sys; from anabranch.cli import main; sys.exit(main())"
KEY = "sk-test"
PROMPT = "import os\n\n\ndef "
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of the shipped model."""
    path, random = tmp_path_factory.mktemp("adapters") / "lora", torch.Generator().manual_seed(0)
    settings = RankLoraSettings(ranks=8)
    model = load_model(serve_command.SHIPPED)
    adapted = attach(model, lambda name, i, o: RankLora(i, o, settings, generator=random))
    for layer in adapted.values():
        torch.nn.init.normal_(layer.b, std=0.1, generator=random)
    save_adapters(path, adapted)
    return path


@pytest.fixture(scope="module")
def address(adapter):
    """A server over the shipped model; it must end well."""
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--served-model-name", "bytes", "alias"]
    command += ["--adapter", f"poet={adapter}", "--adapter-root", str(adapter.parent)]
    environment = {**os.environ, "ANABRANCH_API_KEY": KEY}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        line = process.stdout.readline()
        assert line.startswith("anabranch: bytes at http://"), process.stderr.read()
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
        assert (process.returncode, printed, errors) == (0, "", "")


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def text():
    (output,) = LLM(serve_command.SHIPPED).generate(PROMPT, SamplingParams(**GREEDY))
    return output.outputs[0].text


def test_completions(client, text):
    answer = client.completions.create(model="bytes", prompt=PROMPT, logprobs=2, extra_body={"top_k": 3}, **GREEDY)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert len(answer.choices[0].logprobs.token_logprobs) == 24
    assert client.completions.create(model="alias", prompt=[1, 2], max_tokens=1).model == "alias"


def test_a_stream_with_usage(client, text):
    options = {"include_usage": True}
    parts = list(client.completions.create(model="bytes", prompt=PROMPT, stream=True, stream_options=options, **GREEDY))
    assert "".join(choice.text for part in parts for choice in part.choices) == text
    assert parts[-1].usage.total_tokens == len(PROMPT) + 24


def test_many_at_once_from_asyncio(address, text):
    async def one(client, seed):
        stream = await client.completions.create(model="bytes", prompt=PROMPT, stream=True, seed=seed, **GREEDY)
        return "".join([choice.text async for part in stream for choice in part.choices])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(20)))

    assert asyncio.run(all_of_them()) == [text] * 20


def test_errors_become_the_clients_own(client, address):
    with pytest.raises(openai.NotFoundError, match="the model 'x' is not here"):
        client.completions.create(model="x", prompt="a")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as caught:
        client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "a"}], tools=[{}])
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["bytes", "alias", "poet"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_an_adapter_by_its_name(address, client, adapter, text):
    llm = LLM(serve_command.SHIPPED, adapters={"poet": adapter})
    (output,) = llm.generate(PROMPT, SamplingParams(**GREEDY), adapter="poet")
    answer = client.completions.create(model="poet", prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == output.outputs[0].text != text
    load = client.post("/load_lora_adapter", body={"lora_name": "more", "lora_path": "lora"}, cast_to=str)
    assert load == "Success: LoRA adapter 'more' added successfully."
    assert client.completions.create(model="more", prompt=PROMPT, **GREEDY).choices[0].text == output.outputs[0].text
    client.post("/unload_lora_adapter", body={"lora_name": "more"}, cast_to=str)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "--adapter must be NAME=DIR, got 'a'"),
        (["=b"], "--adapter must be NAME=DIR, got '=b'"),
        (["a=b", "a=c"], "--adapter a=c: the name 'a' is taken"),
        ([f"{serve_command.SHIPPED.name}=b"], "is taken"),
    ],
)
def test_adapters_that_cannot_be_are_told_before_anything_loads(capsys, monkeypatch, given, message):
    monkeypatch.setattr(serve_command, "load", lambda args: pytest.fail("loaded"))
    assert main(["serve", "--port", "0", *(word for one in given for word in ("--adapter", one))]) == 2
    assert message in capsys.readouterr().err
    assert main(["serve", "--port", "0", "--adapter-root", "/nowhere"]) == 2
    assert "adapter_root must be a folder, got '/nowhere'" in capsys.readouterr().err


def test_an_adapters_folder_that_is_not_there_is_told(capsys):
    assert main(["serve", "--port", "0", "--adapter", "a=/nowhere"]) == 2
    assert "no adapter folder at /nowhere" in capsys.readouterr().err


def test_what_is_missing_is_said_in_one_line_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(serve_command, "load", lambda args: pytest.fail("loaded"))
    assert main(["serve", "--port", "70000"]) == 2
    assert "port must be in [0, 65535], got 70000" in capsys.readouterr().err
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve"]) == 2
    assert "serve needs uvicorn; install with: pip install 'anabranch[serve]'" in capsys.readouterr().err


def test_a_folder_without_a_model_is_told(capsys):
    assert main(["serve", "/nowhere", "--port", "0"]) == 2
    assert "is not a model folder" in capsys.readouterr().err


def test_options_become_settings(monkeypatch):
    from anabranch.cli import build_parser

    monkeypatch.setenv("ANABRANCH_API_KEY", "from-the-environment")
    args = build_parser().parse_args(["serve", "/models/Some-1B/", "--max-queue", "3", "--drain-timeout", "2"])
    settings = serve_command.read_settings(args)
    assert settings.api_key == "from-the-environment"
    assert (settings.model_names, settings.max_queue, settings.drain_timeout_s) == (("Some-1B",), 3, 2.0)
    args = build_parser().parse_args(["serve", "--api-key", "given"])
    assert serve_command.read_settings(args).api_key == "given"
