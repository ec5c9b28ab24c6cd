"""The command: for people, for machines, and its output as a model that generates."""

import json
import re

import pytest

from anabranch import LLM, SamplingParams
from anabranch.cli import main


def test_a_conversion_says_what_it_costs(make_checkpoint, text, tmp_path, capsys):
    model, out = make_checkpoint("llama"), tmp_path / "out"
    arguments = ["convert", str(model), str(out), "--key-heads", "2", "--context", "32", "--text", str(text)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 4 -> 2 K heads by svd; cache 384 -> 288 bytes per token"
    assert re.fullmatch(r"energy of the keys lost, by layer: \d+\.\d% \d+\.\d%", lines[1])
    assert re.fullmatch(r"\d+ tokens of text, against the original:", lines[2])
    number = r" +\d+\.\d+"
    assert re.fullmatch(rf"  original   perplexity{number}", lines[3])
    assert re.fullmatch(rf"  merged     perplexity{number}  KL{number} nats  same best token \d+\.\d%", lines[4])
    assert len(lines) == 5


def test_json_and_healing(make_checkpoint, text, tmp_path, capsys):
    arguments = ["convert", str(make_checkpoint("qwen2")), str(tmp_path / "out"), "--key-heads", "1", "--context", "32"]
    arguments += ["--text", str(text), "--heal", "6", "--warmup", "1", "--batch", "2", "--no-progress", "--json"]
    capsys.readouterr()  # what transformers said while it saved
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report["key_heads"] == [4, 1]
    assert report["healed"]["kl"] < report["merged"]["kl"]
    assert main([*arguments[:-1], "--resume"]) == 0
    assert "healed     perplexity" in capsys.readouterr().out


def test_what_the_user_can_mend_takes_one_line(make_checkpoint, tmp_path, capsys):
    model = make_checkpoint("qwen3", head_dim=6)
    capsys.readouterr()  # what transformers said while it saved
    assert main(["convert", str(model), str(tmp_path / "out"), "--key-heads", "2"]) == 2
    assert capsys.readouterr().err.startswith("anabranch: a qwen3 model norms every key after its projection")


@pytest.mark.parametrize("heads", [4, 2])
def test_stories260k_still_tells_its_story(heads, data, tmp_path, capsys):
    folder = data("stories260k")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--key-heads", str(heads)]) == 0
    expected = json.loads((folder / "expected_greedy.json").read_text())["ids"]
    outputs = LLM(tmp_path / "out", max_num_seqs=1).generate(
        [expected[:1]], SamplingParams(temperature=0, max_tokens=200)
    )
    got = list(outputs[0].outputs[0].token_ids)
    if heads == 4:
        assert got == expected[1:]
    else:  # merged: another story, but still one
        assert outputs[0].outputs[0].text.startswith("Once upon a time")
    assert main(["generate", str(tmp_path / "out"), "--prompt", "Once upon", "--max-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output_tokens"] == 5
