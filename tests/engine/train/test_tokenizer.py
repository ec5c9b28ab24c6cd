"""The byte tokenizer, read by transformers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anabranch.train.corpus import BOS, EOS, VOCAB_SIZE
from anabranch.train.tokenizer import BOS_TEXT, EOS_TEXT, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, context=512)
    return AutoTokenizer.from_pretrained(folder)


@given(st.text().filter(lambda text: BOS_TEXT not in text and EOS_TEXT not in text))
def test_a_text_becomes_its_bytes_and_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n\t x", "a , b .", "naïve 日本 🐍", "\x00\x7f\r\n", "<|begin|"])
def test_awkward_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_marks_are_the_two_tokens_beyond_the_bytes(tokenizer):
    assert tokenizer(f"{BOS_TEXT}a{EOS_TEXT}")["input_ids"] == [BOS, 97, EOS]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (BOS, EOS, VOCAB_SIZE)
    assert tokenizer.decode([BOS, 97, EOS], skip_special_tokens=True) == "a"
