import json

import pytest
from tokenizers import pre_tokenizers

from anabranch.data.tokenizer import load_tokenizer

TEXTS = ["", "Once upon a time", " two  spaces\n", "né 你 😀", "Lily's 3 cats."]


def test_a_tokenizer_file_is_read_as_it_is(data):
    from transformers import AutoTokenizer

    folder = data("stories260k")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.backend_tokenizer.decode(ours.encode(text)) == text


def test_older_files_are_converted(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate([*alphabet, "on", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\no n\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("on") == [vocab["on"]]
    for text in TEXTS:
        assert tokenizer.backend_tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["README.md", None])
def test_a_folder_may_have_none(tmp_path, name):
    if name:
        (tmp_path / name).write_text("x")
    assert load_tokenizer(tmp_path) is None
