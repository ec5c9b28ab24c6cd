import io
import json
import re

import pytest
import torch

from anabranch import LLM, SamplingParams
from anabranch.adapters.attach import attach
from anabranch.adapters.files import save_adapters
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.cli import main
from anabranch.models.weights import load_model
from anabranch.serve import generate_command


@pytest.fixture(autouse=True)
def roof(monkeypatch):
    """A fixed roof: measuring the real one takes longer than these tests."""
    monkeypatch.setattr("anabranch_kernels.roofline.read_bandwidth", lambda device: 1e9)


@pytest.fixture
def stories(data):
    return str(data("stories260k"))


def test_text_streams_and_ends_with_one_line_of_speed(stories, capsys):
    start = "Once upon a time, there was a"
    assert main(["generate", stories, "--prompt", start, "--max-tokens", "30", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(start + " little girl named Lily.")
    line = captured.err.strip().splitlines()[-1]
    number = r"\d+(\.\d+)?"
    pattern = (
        rf"\[\d+ \+ 30 tokens: {number} tokens/s, first after {number} ms, \d+% of the read bandwidth \(1.0 GB/s\)\]"
    )
    assert re.fullmatch(pattern, line)


def test_json_for_machines_and_a_prompt_from_stdin(stories, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    arguments = ["generate", stories, "--prompt", "-", "--max-tokens", "8", "--temperature", "0", "--json"]
    assert main([*arguments, "--stop", "little"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert (report["prompt"], report["text"], report["finish_reason"]) == ("Once upon a time", ", there was a ", "stop")
    assert report["output_tokens"] <= 8
    assert report["roof_share"] > 0
    assert report["tokens_per_s"] > 0


def test_one_token_has_no_pace(stories, capsys):
    assert main(["generate", stories, "--prompt", "Once", "--max-tokens", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["output_tokens"], report["tokens_per_s"], report["roof_share"]) == (1, None, None)


def test_the_same_seed_gives_the_same_text(stories, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", stories, "--prompt", "Once", "--max-tokens", "20", "--seed", seed, "--json"])
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_what_is_missing_is_said_in_one_line(stories, capsys):
    assert main(["generate", stories]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert main(["generate", "/nowhere", "--prompt", "x"]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert main(["generate", stories, "--prompt", "x", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(["generate", stories, "--prompt", "x", "--temperature", "-1"]) == 2
    assert "temperature must be" in capsys.readouterr().err


def test_without_arguments_the_shipped_model_writes_python(capsys):
    assert main(["generate", "--max-tokens", "64"]) == 0
    assert capsys.readouterr().out.startswith(generate_command.SHIPPED_PROMPT)


def test_an_output_has_the_form_it_was_asked_for(stories, capsys, tmp_path):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
    }
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    forms = (
        ["--json-schema", str(tmp_path / "schema.json")],
        ["--regex", "[ab]{3}"],
        ["--choice", "yes", "--choice", "no"],
    )
    texts = []
    for form in forms:
        assert main(["generate", stories, "--prompt", "Once", "--max-tokens", "60", "--json", *form]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["finish_reason"] == "stop"
        texts.append(report["text"])
    assert 0 <= json.loads(texts[0])["n"] < 100
    assert re.fullmatch("[ab]{3}", texts[1])
    assert texts[2] in ("yes", "no")


def test_a_form_that_makes_no_sense_is_said_in_one_line(stories, capsys, tmp_path):
    assert main(["generate", stories, "--prompt", "x", "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main(["generate", stories, "--prompt", "x", "--regex", "a("]) == 2
    assert "unclosed group" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", stories, "--prompt", "x", "--regex", "a", "--choice", "b"])
    assert "not allowed with" in capsys.readouterr().err


def test_an_adapter_changes_the_text(tmp_path, capsys):
    settings, random = RankLoraSettings(ranks=8), torch.Generator().manual_seed(0)
    model = load_model(generate_command.SHIPPED)
    adapted = attach(model, lambda name, i, o: RankLora(i, o, settings, generator=random))
    for layer in adapted.values():
        torch.nn.init.normal_(layer.b, std=0.1, generator=random)
    save_adapters(tmp_path, adapted)
    texts = []
    for extra in ([], ["--adapter", str(tmp_path)]):
        assert main(["generate", "--max-tokens", "20", "--temperature", "0", "--json", *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    llm = LLM(generate_command.SHIPPED, adapters={"a": tmp_path})
    params = SamplingParams(max_tokens=20, temperature=0)
    outputs = llm.generate([generate_command.SHIPPED_PROMPT] * 2, params, adapter=[None, "a"])
    assert texts == [output.outputs[0].text for output in outputs]
    assert texts[0] != texts[1]
    assert main(["generate", "--adapter", str(tmp_path / "x")]) == 2
    assert "no adapter folder at" in capsys.readouterr().err
